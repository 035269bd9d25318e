"""The paper's ablation tables, trained row by row: ``mcibi-fast ablate``.

``table`` says what a table is, ``paper`` holds them with the printed numbers, ``configure`` makes
the rows' training configurations, ``runs`` trains them or finds them trained, ``measures`` says
what is measured on a trained model, ``results`` puts the measured numbers beside the paper's.
"""
