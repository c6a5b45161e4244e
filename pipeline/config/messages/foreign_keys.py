"""Keys of other programs (nanoGPT, litgpt, torchtitan, Hugging Face's Trainer, NeMo, sbatch), and ours for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Ours, and what others call it. A key that both use is not listed.
_SAME = {
    "name": "run_name exp_name experiment_name job_name wandb_run_name",
    "runs_dir": "out_dir output_dir log_dir dump_folder exp_dir save_dir",
    "data.path": "data_prefix data_cache_dir data_dir",
    "data.sources": "dataset datasets dataset_name dataset_path train_files train_data_path train_data data_path",
    "data.validation_fraction": "val_split_fraction validation_split val_split",
    "tokenizer.path": "tokenizer_dir tokenizer_path tokenizer_name tokenizer_model hf_assets_path",
    "model.context_length": "block_size seq_len seq_length sequence_length max_seq_len max_seq_length "
    "encoder_seq_length max_position_embeddings context_size ctx_len n_ctx",
    "model.d_model": "n_embd hidden_size dim n_embed embed_dim hidden_dim",
    "model.num_layers": "n_layer n_layers num_hidden_layers",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.num_kv_heads": "n_kv_heads n_kv_head num_key_value_heads num_query_groups n_query_groups",
    "model.d_ff": "intermediate_size ffn_hidden_size ffn_dim n_inner",
    "model.vocab_size": "padded_vocab_size n_vocab",
    "model.rope_theta": "rope_base rotary_base rotary_emb_base",
    "model.norm_eps": "rms_norm_eps layernorm_epsilon layer_norm_eps norm_epsilon",
    "model.tie_embeddings": "tie_word_embeddings share_embeddings_and_output_weights enable_weight_tying weight_tying",
    "model.qkv_bias": "attention_bias add_qkv_bias",
    "model.qk_norm": "norm_qk qk_layernorm use_qk_norm",
    "init.from": "init_from initial_checkpoint_dir model_name_or_path pretrained_model_name_or_path checkpoint_dir "
    "initial_load_path restore_from_path",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler lr_decay_style lr_schedule decay_type",
    "optimizer.learning_rate": "lr max_lr peak_lr",
    "optimizer.min_learning_rate": "min_lr lr_min",
    "optimizer.warmup_iters": "warmup_steps lr_warmup_steps num_warmup_steps lr_warmup_iters",
    "optimizer.cosine_cycle_iters": "lr_decay_iters lr_decay_steps",
    "optimizer.decay_iters": "cooldown_steps decay_steps lr_wsd_decay_iters",
    "optimizer.weight_decay": "wd",
    "optimizer.eps": "adam_epsilon adam_eps epsilon",
    "optimizer.gradient_clip_val": "grad_clip max_norm max_grad_norm clip_grad gradient_clipping grad_norm_clip",
    "optimizer.z_loss": "z_loss_weight z_loss_coeff",
    "train.batch_size": "global_batch_size train_batch_size effective_batch_size",
    "train.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu local_batch_size "
    "batch_size_per_gpu device_batch_size",
    "train.max_iters": "max_steps steps train_iters num_steps num_train_steps total_steps train_steps num_iterations",
    "train.log_interval": "logging_steps log_freq log_every_n_steps log_every",
    "train.val_interval": "eval_interval eval_steps val_check_interval eval_every eval_freq",
    "train.num_val_batches": "eval_iters limit_val_batches eval_batches",
    "train.checkpoint_interval": "save_steps save_interval ckpt_interval save_every checkpoint_every",
    "train.seed": "random_seed manual_seed data_seed",
    "train.precision": "dtype bf16 mixed_precision mixed_precision_param",
    "train.compile": "torch_compile use_compile",
    "train.activation_checkpointing": "gradient_checkpointing activation_checkpoint recompute_granularity recompute",
    "train.zero_stage": "fsdp strategy sharding_strategy zero_optimization data_parallel_shard_degree",
    "train.offload_optimizer": "cpu_offload offload",
    "checkpoint.keep_last": "save_total_limit keep_latest_k save_top_k",
    "tracking.experiment": "wandb_project project project_name mlflow_experiment",
    "tracking.uri": "report_to logger logger_name tracker log_with",
}

_STEPS = "training is counted in steps of train.batch_size sequences: train.max_iters"
_NO_MODEL_PARALLELISM = "there is no tensor, pipeline, context or expert parallelism; train.zero_stage shares the state"
_DERIVED = (
    "not a setting: train.batch_size is divided by train.micro_batch_size and the number of processes, and the rest is "
    "accumulated"
)
_BY_THE_JOB = "not part of an experiment: the site file's train.nodes, train.tasks_per_node and train.gpus_per_node"
# Keys without a counterpart of the same meaning.
_OTHERWISE = {
    "epochs num_epochs max_epochs num_train_epochs": f"{_STEPS} = epochs x training tokens / "
    "(train.batch_size x model.context_length); `pipeline check` says how many epochs a config makes",
    "max_tokens num_tokens train_tokens": f"{_STEPS} = tokens / (train.batch_size x model.context_length)",
    "gradient_accumulation_steps accumulate_grad_batches grad_accum_steps": _DERIVED,
    "fp16 float16 amp loss_scale": "there is no fp16; train.precision is fp32 or bf16",
    "tf32": "there is no such setting; train.precision is fp32 or bf16",
    "warmup_ratio lr_warmup_fraction warmup_fraction": "warm-up is counted in steps: optimizer.warmup_iters",
    "min_lr_factor min_lr_ratio": "a rate, not a factor: optimizer.min_learning_rate",
    "decay_ratio decay_fraction": "the decay of schedule: wsd is counted in steps: optimizer.decay_iters",
    "decay_lr": "optimizer.schedule: constant keeps the rate; every other schedule lowers it",
    "beta1 beta2 adam_beta1 adam_beta2 beta_1 beta_2": "one list of both: optimizer.betas, for example [0.9, 0.95]",
    "optim optimizer_name": "the optimizer is AdamW; the section optimizer has its settings",
    "dropout hidden_dropout attention_dropout attn_dropout resid_dropout": "models have no dropout; leave it out",
    "bias add_bias_linear": "layers have no biases, but queries, keys and values may: model.qkv_bias",
    "model_name model_type flavor": "the section model says the shape; `pipeline new --from hf:FOLDER` takes it "
    "from a model",
    "devices num_gpus n_gpus gpus num_nodes nnodes nproc_per_node world_size": _BY_THE_JOB,
    "tensor_model_parallel_size tensor_parallel_degree tensor_parallel_size pipeline_model_parallel_size "
    "pipeline_parallel_degree pipe_parallel_size model_parallel_size context_parallel_size context_parallel_degree "
    "expert_model_parallel_size expert_parallel_degree": _NO_MODEL_PARALLELISM,
    "data_parallel_replicate_degree": "every process that the job starts trains; train.zero_stage shares the state",
    "resume resume_from_checkpoint resume_from resume_if_exists load_checkpoint": "leave it out: the same command "
    "resumes the run; init.from begins a new one from another's checkpoint",
    "eval_only always_save_checkpoint overwrite_output_dir": "there is no such setting; leave it out",
    "backend ddp_backend": "not a setting: NCCL on GPUs, gloo on CPUs",
    "num_workers dataloader_num_workers prefetch_factor pin_memory": "not a setting: batches are read from memory maps",
    "wandb wandb_log use_wandb enable_wandb tensorboard enable_tensorboard": "the run folder records everything, "
    "and MLflow is fed from it: tracking.uri",
    "lora lora_r lora_alpha peft qlora": "there is no LoRA; every weight is trained",
}

_OF_SBATCH = {
    "train.time_limit_min": "time time_limit walltime timeout",
    "train.partition": "partition queue",
    "train.nodes": "nodes num_nodes nnodes",
    "train.tasks_per_node": "ntasks_per_node ntasks tasks",
    "train.gpus_per_node": "gpus gres gpus_per_node gpus_per_task num_gpus devices",
    "train.cpus_per_task": "cpus_per_task cpus",
    "train.mem_gb": "mem memory mem_per_node",
    "account": "project charge_account",
    "environment": "env environment_variables env_vars exports",
    "modules": "module module_load",
    "setup": "prologue pre_commands commands script",
    "container": "image apptainer singularity",
    "extra_sbatch": "sbatch sbatch_options slurm additional_parameters",
}


def _by_key(table: dict[str, str]) -> dict[str, str]:
    return {key: words for keys, words in table.items() for key in keys.split()}


CONFIG_KEYS = {key: f"here it is {ours}" for ours, keys in _SAME.items() for key in keys.split()} | _by_key(_OTHERWISE)
SITE_KEYS = {key: f"here it is {ours}" for ours, keys in _OF_SBATCH.items() for key in keys.split()}


def answer(path: str, foreign: Mapping[str, str]) -> str | None:
    """Returns what to write in place of a key of another program; None for a key that is not known as one.

    Args:
        path: The dotted path at which it was found.
        foreign: The answers by key.
    """
    key = re.sub(r"[^a-z0-9]+", "_", path.rpartition(".")[2].lower())
    words = foreign.get(key)
    return None if words is None or words.endswith(f" {path}") else words
