"""Controls that the paper lacks: what the class representations hold, and what the head costs."""

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

HEAD = Table(
    "what the layers of the head cost, and what W learns from the context",
    "not in the paper: controls with the same backbone",
    (),
    (
        Row("FCN", ("model.name=fcn",)),
        Row("FCN of two convolutions", ("model.name=fcn", "model.options.convs=2")),
        Row("FCN+MCIBI++", ()),
        Row("W detached", ("model.options.detach_weights=true",)),
        Row("linear projections", ("model.options.projections=paper",)),
    ),
    note="FCN has one convolution between the backbone and the classifier, the released FCN two, "
    "MCIBI++ three besides the attention. W detached: W learns from its own loss alone. linear "
    "projections: those of the attention, without batch norm and ReLU, as in Eq. 13.",
)
