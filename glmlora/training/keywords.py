"""The keywords of `glmlora.train`, for type checkers and editors alone.

They cannot be derived where a checker would see it (PEP 692), so they stand here once more;
tests/test_arguments.py holds their names and types against the fields in arguments.py.
"""

from __future__ import annotations

from typing import TypedDict

from .flags import StrPath


class TrainKeywords(TypedDict, total=False):
    """Every flag of `glmlora train` but the model's directory."""

    # model
    use_v2: bool
    config_name: StrPath | None
    tokenizer_name: StrPath | None
    cache_dir: StrPath | None
    use_fast_tokenizer: bool
    model_revision: str
    use_auth_token: bool
    quantization_bit: int | None
    quantization_type: str
    double_quantization: bool
    compute_dtype: str | None
    checkpoint_dir: str | list[str] | None
    reward_model: str | None
    resume_lora_training: bool
    plot_loss: bool
    family: str
    threads: int | None

    # data
    dataset: str
    dataset_dir: StrPath
    split: str
    overwrite_cache: bool
    preprocessing_num_workers: int | None
    max_source_length: int
    max_target_length: int
    max_samples: int | None
    eval_num_beams: int | None
    ignore_pad_token_for_loss: bool
    source_prefix: str | None
    dev_ratio: float
    truncation: str
    template: str

    # finetuning
    stage: str
    finetuning_type: str
    num_layer_trainable: int
    name_module_trainable: str
    pre_seq_len: int
    prefix_projection: bool
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_target: str | list[str]
    use_dora: bool
    init_lora_weights: str
    modules_to_save: str | list[str] | None

    # training
    output_dir: StrPath
    overwrite_output_dir: bool
    do_train: bool
    do_eval: bool
    do_predict: bool
    evaluation_strategy: str
    eval_strategy: str | None
    eval_steps: float | None
    eval_delay: float
    prediction_loss_only: bool
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    per_gpu_train_batch_size: int | None
    per_gpu_eval_batch_size: int | None
    gradient_accumulation_steps: int
    eval_accumulation_steps: int | None
    learning_rate: float
    loraplus_lr_ratio: float
    neftune_noise_alpha: float | None
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    num_train_epochs: float
    max_steps: int
    lr_scheduler_type: str
    warmup_ratio: float
    warmup_steps: int
    log_level: str
    log_level_replica: str
    log_on_each_node: bool
    logging_dir: StrPath | None
    logging_strategy: str
    logging_first_step: bool
    logging_steps: float
    logging_nan_inf_filter: bool
    save_strategy: str
    save_steps: float
    save_total_limit: int | None
    save_safetensors: bool
    save_on_each_node: bool
    no_cuda: bool
    use_cpu: bool
    use_mps_device: bool
    use_ipex: bool
    jit_mode_eval: bool
    xpu_backend: str | None
    tpu_num_cores: int | None
    tpu_metrics_debug: bool
    seed: int
    data_seed: int | None
    fp16: bool
    bf16: bool
    fp16_opt_level: str
    half_precision_backend: str
    fp16_backend: str
    fp16_full_eval: bool
    bf16_full_eval: bool
    tf32: bool | None
    local_rank: int
    ddp_backend: str | None
    ddp_find_unused_parameters: bool | None
    ddp_bucket_cap_mb: int | None
    ddp_timeout: int
    sharded_ddp: str
    fsdp: str
    fsdp_min_num_params: int
    fsdp_config: str | None
    fsdp_transformer_layer_cls_to_wrap: str | None
    deepspeed: str | None
    mp_parameters: str
    debug: str
    past_index: int
    skip_memory_metrics: bool
    use_legacy_prediction_loop: bool
    include_inputs_for_metrics: bool
    ray_scope: str
    label_names: str | list[str] | None
    remove_unused_columns: bool
    dataloader_drop_last: bool
    dataloader_num_workers: int
    dataloader_pin_memory: bool
    disable_tqdm: bool | None
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool | None
    label_metrics: bool
    early_stopping_patience: int | None
    ignore_data_skip: bool
    label_smoothing_factor: float
    optim: str
    optim_args: str | None
    adafactor: bool
    group_by_length: bool
    length_column_name: str
    report_to: str | list[str] | None
    run_name: str | None
    push_to_hub: bool
    hub_model_id: str | None
    hub_strategy: str
    hub_token: str | None
    hub_private_repo: bool
    push_to_hub_model_id: str | None
    push_to_hub_organization: str | None
    push_to_hub_token: str | None
    resume_from_checkpoint: StrPath | bool | None
    gradient_checkpointing: bool
    auto_find_batch_size: bool
    full_determinism: bool
    torchdynamo: str | None
    torch_compile: bool
    torch_compile_backend: str | None
    torch_compile_mode: str | None
    sortish_sampler: bool
    predict_with_generate: bool
    generation_max_length: int | None
    generation_num_beams: int | None
    generation_config: str | None
