"""Controls that the paper lacks: does it matter what the class representations C_dl hold?"""

from __future__ import annotations

from mcibi_fast.ablations.table import Row, Table

CODES = Table(
    "what the class representations hold",
    "not in the paper: controls with the same head",
    (),
    (
        Row("FCN", ("model.name=fcn",)),
        Row("random", ("model.options.memory_update=false",)),
        Row("learnt", ("model.options.form=learnt",)),
        Row("mean and deviation", ()),
        Row("per channel", ("model.options.form=diagonal",)),
    ),
    note="random: fixed draws from N(0, 1), which the memory never changes. learnt: a vector per "
    "class that gradient descent learns, as in an embedding. mean and deviation: MCIBI++, two "
    "numbers per class. per channel: a mean and a deviation for each class and channel.",
)
