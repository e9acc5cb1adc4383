"""What a Ray worker of this machine, for trials that train, imports before it has one."""

from tune_study.machine.environment import spared_from_collection

with spared_from_collection():
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401

    import tune_study.cluster.trainable
    import tune_study.trial.execution  # noqa: F401
