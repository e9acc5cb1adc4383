from tune_study.folder import schema

TRIALS = (
    "trial_id model dataset lora_r lora_alpha quantization seed status simulated epochs_completed "
    "best_epoch val_accuracy test_accuracy test_loss total_parameters trainable_parameters "
    "quantized_layers weights_bytes weights_bytes_fp32 weights_bytes_16bit quantization_error "
    "adapter_bytes gradient_bytes optimizer_bytes activation_bytes peak_train_bytes peak_source "
    "rss_peak_bytes batch_size gradient_accumulation_steps train_time_s eval_time_s images_per_s "
    "grad_norm_mean grad_norm_std grad_norm_cv grad_explosions grad_vanishing_layers loss_spikes "
    "stability_score gradient_cosine gradient_norm_ratio device error"
)
EPOCHS = (
    "trial_id epoch train_loss train_accuracy val_loss val_accuracy learning_rate epoch_time_s "
    "images_per_s grad_norm_mean grad_norm_std grad_norm_min grad_norm_max grad_norm_cv "
    "grad_explosions grad_vanishing_layers loss_spikes stability_score"
)


def test_the_promised_columns_are_there_once():
    for promised, table in ((TRIALS, schema.TRIALS), (EPOCHS, schema.EPOCHS)):
        names = [column.name for column in table]
        assert len(set(names)) == len(names)
        assert set(promised.split()) <= set(names)
        assert list(schema.dtypes(table)) == names


def test_every_column_says_what_it_is():
    for column in (*schema.TRIALS, *schema.EPOCHS):
        assert column.meaning
        assert column.name.endswith("_bytes") == (column.unit == "bytes") or "bytes" in column.name


def test_statuses_are_split_without_a_rest():
    assert set(schema.GOOD_STATUSES) < set(schema.FINISHED_STATUSES) < set(schema.STATUSES)
