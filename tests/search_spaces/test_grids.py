from search_spaces import grids
from tune_study.model.layers import plan_layers, skeleton_of
from tune_study.study.plan import plan


def test_the_full_grid_has_144_trials():
    assert len({trial.trial_id for trial in plan(grids.full())}) == 144


def test_adapters_crosses_six_of_them_with_nf4_and_its_baseline():
    trials = plan(grids.adapters())
    assert len(trials) == len({trial.trial_id for trial in trials}) == 36
    cells = {(t.lora.model_dump_json(), t.quantization.mode, t.seed) for t in trials}
    assert len(cells) == 36
    assert {t.quantization.mode for t in trials} == {"none", "nf4"}
    found = {(t.lora.init_lora_weights, t.lora.use_dora, t.lora.use_rslora) for t in trials}
    assert found == {
        ("default", False, False),
        ("default", False, True),
        ("default", True, False),
        ("pissa", False, False),
        ("loftq", False, False),
        ("loftq", True, False),
    }
    assert {t.lora.lora_dropout for t in trials} == {0.0}  # it would drop principal parts


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
