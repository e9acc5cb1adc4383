from search_spaces import grids
from tune_study.model.layers import plan_layers, skeleton_of
from tune_study.study.plan import plan


def test_the_full_grid_has_144_trials():
    assert len({trial.trial_id for trial in plan(grids.full())}) == 144


def test_sensitivity_quantizes_one_block_at_a_time():
    trials = plan(grids.sensitivity())
    assert len(trials) == 42
    skeleton = skeleton_of("deit_tiny_patch16_224", 10, None)
    found = []
    for trial in trials[:14]:  # of the first seed
        layers = plan_layers(skeleton, trial.quantization)
        assert set(layers.values()) <= {"nf4"}
        found.append(sorted({int(name.split(".")[1]) for name in layers}))
    everything = list(range(12))
    assert found == [[], *([block] for block in everything), everything]
    assert [t.quantization.mode for t in trials[:14]] == ["none"] + ["nf4"] * 13
