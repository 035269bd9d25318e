"""The paper's ablation tables, trained row by row: ``mcibi-fast ablate``.

``table`` defines what a table is, ``paper``, ``paper_methods`` and ``paper_video`` hold the tables
with the numbers that the paper prints, ``configure`` makes the training configurations of the rows,
``runs`` trains them or finds them already trained, ``measures`` defines what is measured on a
trained model, and ``results`` puts the measured numbers beside the paper's.
"""
