import pytest

from tune_study.trial import micro_batch
from tune_study.trial.micro_batch import within_memory


@pytest.mark.parametrize(
    ("batch", "steps"), [(32, [16, 8, 4, 2, 1, 1]), (20, [10, 5, 2, 1]), (31, [1]), (1, [1])]
)
def test_micro_batches_shrink_and_keep_the_images_of_a_step(tiny, tmp_path, batch, steps):
    training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 3}
    config = tiny("none", training=training)
    for expected in steps:
        micro = within_memory(config, tmp_path).training.per_device_train_batch_size
        micro_batch.note_out_of_memory(tmp_path, micro, "planted")
        smaller = within_memory(config, tmp_path).training
        assert smaller.per_device_train_batch_size == expected
        assert smaller.gradient_accumulation_steps * expected == 3 * batch


def test_evaluation_batches_shrink_by_the_same_factor(tiny, tmp_path):
    training = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 100}
    config = tiny("none", training=training)
    micro_batch.note_out_of_memory(tmp_path, 32, "planted")
    assert within_memory(config, tmp_path).training.per_device_eval_batch_size == 50
    for micro in (16, 8, 4, 2):
        micro_batch.note_out_of_memory(tmp_path, micro, "planted")
    assert within_memory(config, tmp_path).training.per_device_eval_batch_size == 3
