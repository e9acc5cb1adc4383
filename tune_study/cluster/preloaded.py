"""What a Ray worker of this machine imports as soon as it lives, before it has a trial."""

from tune_study.machine.environment import spared_from_collection

with spared_from_collection():
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401

    import tune_study.cluster.trainable  # noqa: F401
