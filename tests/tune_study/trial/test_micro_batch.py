import pytest

from tune_study.folder.files import write_json
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


@pytest.mark.parametrize(
    ("choice", "taken"),
    [
        ({"micro_batch": 5}, 5),
        ({"micro_batch": 1}, 1),
        ({"micro_batch": 40}, 40),  # all images of the step
        ({"micro_batch": 3}, 20),  # no divisor of the step
        ({"micro_batch": 0}, 20),
        ({"micro_batch": -5}, 20),
        ({"micro_batch": 5.0}, 20),
        ({"micro_batch": True}, 20),
        ([5], 20),
    ],
)
def test_a_choice_is_taken_where_it_divides_the_step(tiny, tmp_path, choice, taken):
    config = tiny("none", training={"gradient_accumulation_steps": 2})
    write_json(tmp_path / micro_batch.CHOICE_FILE, choice)
    assert micro_batch.chosen(config, tmp_path) == (None if taken == 20 else choice)
    found = within_memory(config, tmp_path).training
    assert found.per_device_train_batch_size == taken
    assert found.gradient_accumulation_steps == 40 // taken


def test_the_smallest_micro_batch_that_was_too_large_decides(tiny, tmp_path):
    settings = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 20}
    config = tiny("none", training=settings)
    micro_batch.note_out_of_memory(tmp_path, 8, "x" * 600)
    assert within_memory(config, tmp_path).training.per_device_train_batch_size == 4
    micro_batch.note_out_of_memory(tmp_path, 16, "later")
    small = within_memory(config, tmp_path).training
    assert (small.per_device_train_batch_size, small.per_device_eval_batch_size) == (2, 1)
    first, second = micro_batch.out_of_memory_events(tmp_path)
    assert (first["micro_batch"], first["cause"]) == (8, "x" * 500)
    assert (second["micro_batch"], second["cause"]) == (16, "later")
    micro_batch.note_out_of_memory(tmp_path, 1, "no image fits")
    least = within_memory(config, tmp_path).training
    assert (least.per_device_train_batch_size, least.per_device_eval_batch_size) == (1, 1)
