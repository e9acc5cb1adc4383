"""The columns of the two tables: name, type, unit, meaning.

Standard library only, because ``analysis`` opens a study on machines without torch or ray.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MODES = ("none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
"""Quantization of the frozen base weights, named as in Lightning; ``none`` is the baseline."""

STATUSES = (
    "completed",
    "early_stopped",
    "pruned",
    "diverged",
    "oom",
    "error",
    "interrupted",
    "pending",
)
GOOD_STATUSES = ("completed", "early_stopped")
"""The trial trained as planned and has a test accuracy."""
PLANNED_ENDS = (*GOOD_STATUSES, "pruned")
"""Nothing went wrong: a search stopped a ``pruned`` trial, because others did better."""
FINISHED_STATUSES = (*PLANNED_ENDS, "diverged", "oom", "error")
"""Nothing is left to run. ``interrupted`` and ``pending`` trials run when the study is resumed."""


class Column(NamedTuple):
    """One column. ``kind`` is ``str``, ``int``, ``float`` or ``bool``; a fraction is 0..1."""

    name: str
    kind: str
    unit: str
    meaning: str
    absent: Any = None
    """Of a setting: what a study from before it existed has in its place."""


_GRADIENT_COLUMNS = (
    Column("grad_norm_mean", "float", "", "mean global gradient norm, before clipping"),
    Column("grad_norm_std", "float", "", "standard deviation of the global gradient norm"),
    Column("grad_norm_cv", "float", "", "standard deviation over mean of the global norm"),
    Column("grad_explosions", "int", "steps", "norm not finite, or over 10x the running median"),
    Column("grad_vanishing_layers", "int", "tensors", "norm / weight norm < 1e-7 for 20 steps"),
    Column("loss_spikes", "int", "steps", "loss far above its running median, or not finite"),
    Column("stability_score", "float", "fraction", "1 / (1 + cv) of the global gradient norm"),
    Column("gradient_cosine_successive", "float", "cosine", "mean, between successive gradients"),
)

SETTINGS: tuple[Column, ...] = (
    Column("lora.r", "int", "", "the same as lora_r"),
    Column("lora.lora_alpha", "int", "", "the same as lora_alpha"),
    Column("lora.lora_dropout", "float", "fraction", "dropout before the adapters"),
    Column("lora.target_modules", "str", "", "regular expression over the adapted layers' names"),
    Column("lora.exclude_modules", "str", "", "targets that get no adapter; missing: none"),
    Column("lora.layers_to_transform", "str", "", "adapted blocks, as JSON; missing: all"),
    Column("lora.rank_pattern", "str", "", "ranks of layers by pattern, as JSON", "{}"),
    Column("lora.alpha_pattern", "str", "", "alphas of layers by pattern, as JSON", "{}"),
    Column("lora.use_rslora", "bool", "", "scaled by the root of the rank", False),
    Column("lora.use_dora", "bool", "", "magnitudes learn apart from directions", False),
    Column("lora.init_lora_weights", "str", "", "how the adapters begin", "default"),
    Column("lora.loftq_iter", "int", "steps", "alternating steps of LoftQ", 1),
    Column("lora.bias", "str", "", "biases of the base that learn: none, all, lora_only", "none"),
    Column("lora.lora_bias", "bool", "", "the adapters' B has a bias", False),
    Column("quantization.mode", "str", "", " | ".join(MODES)),
    Column("quantization.skip_layers", "str", "", "patterns of layers left alone, as JSON"),
    Column("quantization.overrides", "str", "", "patterns and modes of their own, as JSON"),
    Column("pretrained", "bool", "", "false: from random weights"),
    Column("data.train_size", "int", "images", "asked for; missing: all"),
    Column("data.val_size", "int", "images", "asked for; missing: a tenth of the training images"),
    Column("data.test_size", "int", "images", "asked for; missing: all"),
    Column("data.image_size", "int", "px", "side; missing: the model's own"),
    Column("data.augment", "str", "", "augmentation of the training images"),
    Column("data.image_column", "str", "", "of a data set with hf:; missing: the only one"),
    Column("data.label_column", "str", "", "of a data set with hf:; missing: the only one"),
    Column("training.num_train_epochs", "int", "epochs", "epochs planned"),
    Column("training.per_device_train_batch_size", "int", "images", "micro-batch planned"),
    Column("training.gradient_accumulation_steps", "int", "", "micro-batches per step, planned"),
    Column("training.per_device_eval_batch_size", "int", "images", "batch of an evaluation"),
    Column("training.learning_rate", "float", "", "highest, after the warm-up"),
    Column("training.weight_decay", "float", "", "AdamW's"),
    Column("training.warmup_steps", "int", "steps", "linear warm-up, before the cosine"),
    Column("training.max_grad_norm", "float", "", "gradients are clipped to it"),
    Column("training.early_stopping_patience", "int", "epochs", "0: never stops early"),
    Column("training.compute_dtype", "str", "", "bf16 or fp32"),
    Column("training.gradient_checkpointing", "bool", "", "blocks are computed twice", False),
    Column("training.gradient_noise_scale", "bool", "", "the noise scale is measured", False),
    Column("training.step", "str", "", "auto, eager or graph, as asked for", "auto"),
)
"""Every field of a trial that has no column of its own name among the first ones: what ``--set``
calls it. All but ``quantization.*`` are the trial's configuration, with model and data set."""
SETTING_NAMES = ("model", "dataset", "seed", *(column.name for column in SETTINGS))
ABSENT = {column.name: column.absent for column in SETTINGS if column.absent is not None}
"""Settings that joined after the first studies, with the value that these had without knowing."""

TRIALS: tuple[Column, ...] = (
    Column("trial_id", "str", "", "the axes and a hash of the whole configuration"),
    Column("model", "str", "", "timm name"),
    Column("dataset", "str", "", "name of the data set"),
    Column("lora_r", "int", "", "LoRA rank"),
    Column("lora_alpha", "int", "", "LoRA alpha"),
    Column("quantization", "str", "", "treatment: mode of the base weights, and what differs"),
    Column("seed", "int", "", "seed of adapter, head, batch order, augmentation and dropout"),
    Column("configuration", "str", "", "all other settings, named by what varies in the study"),
    Column("status", "str", "", " | ".join(STATUSES)),
    Column("simulated", "bool", "", "drawn from a model of learning curves, not trained"),
    Column("epochs_completed", "int", "epochs", "epochs trained and validated"),
    Column("best_epoch", "int", "epoch", "epoch of the best validation accuracy, from 1"),
    Column("val_accuracy", "float", "fraction", "validation accuracy at the best epoch"),
    Column("test_accuracy", "float", "fraction", "test accuracy, once, at the best epoch's state"),
    Column("test_loss", "float", "nats", "test cross-entropy at the best epoch's state"),
    Column("train_images", "int", "images", "images trained on per epoch"),
    Column("val_images", "int", "images", "validation images"),
    Column("test_images", "int", "images", "test images"),
    Column("num_classes", "int", "classes", "classes of the data set"),
    Column("total_parameters", "int", "parameters", "base, adapters and head"),
    Column("trainable_parameters", "int", "parameters", "adapters and head"),
    Column("quantized_layers", "int", "layers", "Linear layers proven to be quantized"),
    Column("quantized_blocks", "str", "", "blocks with quantized layers: 0-11; of stages: 2/0-5"),
    Column("weights_bytes", "int", "bytes", "base weights, quantization state included"),
    Column("weights_bytes_fp32", "int", "bytes", "the same base weights at fp32"),
    Column("weights_bytes_16bit", "int", "bytes", "the same base weights at 16 bit"),
    Column("quantization_error", "float", "fraction", "relative Frobenius error of the weights"),
    Column("initial_error", "float", "fraction", "the same at the start, adapters included"),
    Column("weights_saving_fp32", "float", "fraction", "1 - weights_bytes / weights_bytes_fp32"),
    Column("weights_saving_16bit", "float", "fraction", "1 - weights_bytes / weights_bytes_16bit"),
    Column("step_weights_bytes", "int", "bytes", "frozen base in a step, biases as cast, no state"),
    Column("quantization_state_bytes", "int", "bytes", "scales, codebooks and offsets"),
    Column("adapter_bytes", "int", "bytes", "LoRA matrices and the trained head"),
    Column("gradient_bytes", "int", "bytes", "gradients of the trainable parameters"),
    Column("optimizer_bytes", "int", "bytes", "optimizer state"),
    Column("activation_bytes", "int", "bytes", "saved for backward by one micro-batch"),
    Column("saved_tensor_bytes", "int", "bytes", "the part of it that autograd itself saves"),
    Column("predicted_activation_bytes", "int", "bytes", "activation_bytes, before the start"),
    Column("peak_train_bytes", "int", "bytes", "peak allocated during one training step"),
    Column("predicted_peak_train_bytes", "int", "bytes", "peak_train_bytes, before the start"),
    Column("quantizable_peak_fraction", "float", "fraction", "block weights and state over peak"),
    Column("peak_saving_fp32", "float", "fraction", "bytes saved against fp32 over that peak"),
    Column("peak_source", "str", "", "what measured the peak, or why it could not be"),
    Column("rss_peak_bytes", "int", "bytes", "peak resident memory of the worker process"),
    Column("batch_halvings", "int", "", "times out of memory made the micro-batch smaller"),
    Column("batch_size", "int", "images", "micro-batch of one forward pass"),
    Column("gradient_accumulation_steps", "int", "", "micro-batches per optimizer step"),
    Column("train_time_s", "float", "s", "training, without evaluation"),
    Column("train_energy_j", "float", "J", "the device's, during train_time_s"),
    Column("energy_source", "str", "", "what counted the energy, or why nothing could"),
    Column("eval_time_s", "float", "s", "validation and test"),
    Column("images_per_s", "float", "images/s", "median over the epochs, training only"),
    *_GRADIENT_COLUMNS,
    Column("gradient_noise_scale", "float", "images", "S / |G|^2 over all epochs; NaN when off"),
    Column("gradient_cosine", "float", "cosine", "fidelity: LoRA gradients against the twin"),
    Column("gradient_norm_ratio", "float", "ratio", "fidelity: norm against the twin"),
    Column("gradient_cosine_start", "float", "cosine", "the same, before the first step"),
    Column("gradient_norm_ratio_start", "float", "ratio", "the same, before the first step"),
    Column("feature_cosine", "float", "cosine", "pretrained features against full precision"),
    Column("pretrained_top1_agreement", "float", "fraction", "pretrained head, against the same"),
    Column("pretrained_logit_kl", "float", "nats", "pretrained head, from full precision"),
    Column("device", "str", "", "device that trained it"),
    Column("trials_on_device", "int", "trials", "that could run on it at a time, with this one"),
    Column("step", "str", "", "how steps were given to it: eager, or graph, a CUDA graph"),
    Column("error", "str", "", "one sentence, for a trial that did not end well"),
    *SETTINGS,
)

EPOCHS: tuple[Column, ...] = (
    Column("trial_id", "str", "", "the trial"),
    Column("epoch", "int", "epoch", "from 1"),
    Column("train_loss", "float", "nats", "mean cross-entropy over the epoch's batches"),
    Column("train_accuracy", "float", "fraction", "over the epoch's augmented batches"),
    Column("val_loss", "float", "nats", "validation cross-entropy"),
    Column("val_accuracy", "float", "fraction", "validation accuracy"),
    Column("learning_rate", "float", "", "at the epoch's last step"),
    Column("epoch_time_s", "float", "s", "training and validation"),
    Column("images_per_s", "float", "images/s", "training only"),
    *_GRADIENT_COLUMNS[:3],
    Column("grad_norm_min", "float", "", "smallest global gradient norm"),
    Column("grad_norm_max", "float", "", "largest global gradient norm"),
    *_GRADIENT_COLUMNS[3:],
    Column("gradient_noise_trace", "float", "", "McCandlish's S, mean over steps; NaN when off"),
    Column("gradient_square", "float", "", "McCandlish's |G|^2, mean over steps; NaN when off"),
    Column("gradient_noise_scale", "float", "images", "S / |G|^2 of these means"),
    Column("rss_bytes", "float", "bytes", "most resident memory of the worker in the epoch"),
    Column("system_memory_used_bytes", "float", "bytes", "most memory used by the whole machine"),
    Column("cpu_cores_used", "float", "cores", "mean CPU time of the worker over time"),
    Column("gpu_memory_bytes", "float", "bytes", "most seen of the allocator, once a second"),
)

_DTYPES = {"str": "string", "int": "Int64", "float": "float64", "bool": "boolean"}


def dtypes(table: tuple[Column, ...]) -> dict[str, Any]:
    """pandas dtype of each column, in order. Integers are nullable: missing is never 0."""
    return {column.name: _DTYPES[column.kind] for column in table}
