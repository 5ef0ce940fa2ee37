"""Every key of a DeepSpeed configuration, with its rule: the table that `read_deepspeed` walks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distlib.integrations.deepspeed_optimizers import optimizer, scheduler
from distlib.integrations.deepspeed_rules import (
    Draft,
    Rule,
    Section,
    accumulation,
    cannot,
    flag,
    if_dynamic,
    in_stage_3,
    is_off,
    least_scale,
    micro_batch,
    off_or,
    offload_device,
    offload_is_off,
    offload_to_cpu,
    precision,
    sets,
    static_scale,
    switched,
    torch_autocast,
    train_batch_size,
    unneeded,
    within,
    yours,
    zero_stage,
)

_UNITS = "units of the model are gathered and reduced as one; see units and prefetch"
_WHOLE = "that is how it is always done"
_FILES = "checkpoints fit any number of ranks: distlib.save, load and export"
_LOGS = "log what train_step returns"


def _aliased(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Stage 3's keys have a short name, too."""
    return {**keys, **{key.removeprefix("stage3_"): rule for key, rule in keys.items()}}


OFFLOAD_OPTIMIZER = {
    "device": Rule(offload_device),
    "nvme_path": unneeded("it is read with device"),
    "buffer_count": unneeded("files are streamed through five buffers of 4 MiB per kind of state"),
    "pin_memory": unneeded("memory that a GPU copies from and to is always pinned"),
    "pipeline_read": unneeded("reads are always ahead"),
    "pipeline_write": unneeded("writes are always behind"),
    "fast_init": unneeded("files are made when the state is"),
    "ratio": cannot("all of the state is offloaded, or none", 1, 1.0),
    "super_offload": cannot("it is for GPUs", False),
    "cpuadam_cores_perc": unneeded("the optimizer uses torch.get_num_threads()"),
}

OFFLOAD_PARAM = {
    "device": cannot("parameters stay in memory; stage 3 divides them over ranks"),
    **dict.fromkeys(
        ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"), unneeded("it is read with device")
    ),
}

ZERO: dict[str, Any] = {
    "stage": Rule(zero_stage, "stage"),
    "mics_shard_size": in_stage_3(sets("partition_size", -1)),
    "mics_hierarchical_params_gather": in_stage_3(sets("hierarchical")),
    "zero_hpz_partition_size": in_stage_3(sets("reshard_after_forward", 1)),
    "zero_quantized_weights": in_stage_3(flag("gather_dtype", "int8")),
    "zero_quantized_nontrainable_weights": cannot("frozen parameters are kept as they are", False),
    "zero_quantized_gradients": cannot("gradients are not quantized; precision.reduce halves their bytes", False),
    "zeropp_loco_param": cannot("gradients are not quantized"),
    "offload_optimizer": Section(OFFLOAD_OPTIMIZER, offload_is_off),
    "offload_param": Section(OFFLOAD_PARAM, offload_is_off),
    "zenflow": cannot("optimizer steps are never deferred"),
    "cpu_offload": Rule(offload_to_cpu),
    "cpu_offload_param": cannot("parameters stay in memory", False),
    "cpu_offload_use_pin_memory": unneeded("memory that a GPU copies from and to is always pinned"),
    "overlap_comm": unneeded("communication overlaps always; the numbers are the same"),
    "ignore_unused_parameters": cannot("parameters without a gradient are always allowed", True),
    "leaf_module": yours("name the classes in units=, which are gathered as one", {}),
    "load_from_fp32_weights": unneeded(_FILES),
    "elastic_checkpoint": unneeded(_FILES),
    "pipeline_loading_checkpoint": unneeded(_FILES),
    **dict.fromkeys(
        (
            "contiguous_gradients",
            "reduce_scatter",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "round_robin_gradients",
            "parameter_alignment",
        ),
        unneeded("gradients and parameters lie in flat buffers, aligned, and travel as slices of them"),
    ),
    **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "sub_group_size"), unneeded(_UNITS)),
    "compute_grad_norm": unneeded("the norm is computed where clip asks for it"),
    "legacy_stage1": unneeded("there is one code for all stages"),
    "memory_efficient_linear": unneeded("linear layers are torch's own"),
    "override_module_apply": unneeded("modules see whole parameters in model.summon_full_params()"),
    "log_trace_cache_warnings": unneeded("the recorded order is a hint, which may change"),
    "enable_sanity_checks": unneeded("ranks always check that they gather the same"),
    "save_muon_momentum_buffer_in_memory": unneeded("only distlib.optim keeps state in files, and it has no Muon"),
    **_aliased(
        dict.fromkeys(
            (
                "stage3_prefetch_bucket_size",
                "stage3_param_persistence_threshold",
                "stage3_model_persistence_threshold",
                "stage3_max_live_parameters",
                "stage3_max_reuse_distance",
                "stage3_module_granularity_threshold",
                "stage3_use_all_reduce_for_fetch_params",
                "stage3_allgather_sequential",
            ),
            unneeded(_UNITS),
        )
    ),
    **_aliased(
        dict.fromkeys(
            ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
            unneeded("distlib.export writes whole weights"),
        )
    ),
}

_SCALING = {
    "auto_cast": unneeded("inputs are cast as the model computes"),
    "loss_scale": Rule(static_scale),
    "initial_scale_power": if_dynamic("init_scale", lambda power: 2.0**power if power < 1024 else math.inf),
    "loss_scale_window": if_dynamic("growth_interval", lambda steps: steps if steps % 1 else int(steps)),
    "hysteresis": cannot("the scale halves at the first overflow", 1),
    "consecutive_hysteresis": cannot("the scale halves at the first overflow", False),
    "min_loss_scale": Rule(least_scale),
    "fp16_master_weights_and_grads": cannot("masters and sums of gradients are fp32", False),
}
FP16 = {"enabled": precision("fp16"), **within("fp16", _SCALING)}


def _absent_of_fp16(draft: Draft) -> dict[str, Any]:
    if not (draft.computes_in("fp16") and draft.is_dynamic):
        return {}
    return {"initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}


_BF16 = {
    "immediate_grad_update": unneeded("gradients are added as they are produced"),
    "check_grad_overflow": cannot("only fp16 skips steps; error_if_nonfinite of clip_grad_norm_ raises", False),
    "bf16_master_weights_and_grads": cannot("masters and sums of gradients are fp32", False),
    "bf16_optimizer_states": cannot("optimizer state is fp32", False),
}
BF16 = {"enabled": precision("bf16"), **within("bf16", _BF16)}

PIPELINE = {
    "stages": Rule(
        lambda v, d: d.set("pipeline", v) if v != "auto" else ("unneeded", "pipeline= says it"), "pipeline", True
    ),
    "partition": Rule(
        lambda v, d: (
            ("cannot", "give split= the modules that stages begin with")
            if str(v).startswith("type")
            else ("unneeded", 'split="auto" makes the slowest stage as fast as can be')
        )
    ),
    "seed_layers": cannot("torch's generator is seeded once; see seed", False),
    "activation_checkpoint_interval": Rule(
        lambda v, d: off_or(
            not v, d.set("activations", "full") if v == 1 else ("cannot", "blocks are checkpointed one by one")
        )
    ),
    "pipe_partitioned": unneeded("no tensor parallelism divides what stages send"),
    "grad_partitioned": unneeded("no tensor parallelism divides what stages send"),
}

ACTIVATION_CHECKPOINTING = {
    "partition_activations": unneeded("it divides over tensor-parallel ranks, and there are none"),
    "number_checkpoints": yours(
        'DeepSpeed checkpoints only where the model says so; activations="full" does it for blocks'
    ),
    "contiguous_memory_optimization": unneeded("checkpoints are not copied together"),
    "cpu_checkpointing": yours('activations={"policy": "offload", "folder": ...} moves what blocks keep', False),
    "synchronize_checkpoint_boundary": unneeded("it is for debugging on GPUs"),
    "profile": yours("use torch.profiler", False),
}

DATA_TYPES = {
    "grad_accum_dtype": cannot("gradients are summed in fp32", "fp32"),
    "param_dtype": cannot("masters have the dtype of the module's parameters"),
    "buffer_dtype": cannot("buffers keep their dtype"),
    "keep_in_fp32_modules": cannot("all modules compute in precision.dtype", [], "auto", native=True),
}

CHECKPOINT = {
    "tag_validation": unneeded("folders are checked to be of one step"),
    "load_universal": unneeded(_FILES),
    "use_node_local_storage": cannot("all ranks write into one folder", False),
    "parallel_write": unneeded("every rank writes its part"),
    "checkpoint_serialization": unneeded("files are raw bytes with checksums"),
    "writer": unneeded("distlib.save has a writer of its own"),
}

TORCH_AUTOCAST = {
    "enabled": Rule(torch_autocast, "precision"),
    "dtype": unneeded("it is read with enabled"),
    "lower_precision_safe_modules": cannot("torch.autocast chooses by operation", []),
}

KEYS: dict[str, Rule | Section] = {
    "train_batch_size": Rule(train_batch_size, native=True),
    "train_micro_batch_size_per_gpu": Rule(micro_batch, native=True),
    "gradient_accumulation_steps": Rule(accumulation, "microbatches", native=True),
    "managed_gradient_accumulation": cannot("train_step accumulates its micro-batches", True),
    "zero_optimization": Section(ZERO),
    "fp16": Section(FP16, is_off("fp16"), _absent_of_fp16),
    "bf16": Section(BF16, is_off("bf16")),
    "bfloat16": Section(BF16, is_off("bfloat16")),
    "torch_autocast": Section(TORCH_AUTOCAST, is_off("torch_autocast")),
    "communication_data_type": sets("precision.reduce"),
    "data_types": Section(DATA_TYPES),
    "gradient_clipping": sets("clip", 0),
    "prescale_gradients": cannot("gradients are summed in fp32, then divided", False),
    "gradient_predivide_factor": cannot("gradients are summed in fp32, then divided", 1, 1.0),
    "gradient_allreduce_op": cannot("gradients are averaged: multiply the loss", "mean"),
    "optimizer": Rule(optimizer),
    "scheduler": Rule(scheduler),
    "pipeline": Section(PIPELINE),
    "activation_checkpointing": Section(ACTIVATION_CHECKPOINTING),
    "checkpoint": Section(CHECKPOINT),
    "zero_allow_untested_optimizer": unneeded("any optimizer that treats elements alike is allowed"),
    "zero_force_ds_cpu_optimizer": unneeded("the optimizer is the one you pass"),
    "aio": unneeded("distlib.optim streams its files in chunks of 4 MiB"),
    "disable_allgather": cannot("ranks gather what optimizers wrote", False),
    "dataloader_drop_last": yours("pass drop_last=True to the DataLoader", False),
    "disable_python_gc": yours("gc.disable() in the script", False),
    "vocabulary_size": unneeded("DeepSpeed only warns of it"),
    "steps_per_print": unneeded("distlib prints nothing of its own"),
    "log_level": unneeded("distlib prints nothing of its own"),
    "dump_state": yours("print(plan)", False),
    "wall_clock_breakdown": yours("use torch.profiler; distlib.ledger() has the time of communication", False),
    "timers": switched("use torch.profiler", "yours"),
    "memory_breakdown": yours("memory_report() of the wrapped model", False),
    "comms_logger": switched("print(distlib.ledger()): calls and bytes per operation, group and link", "yours"),
    "flops_profiler": switched("torch.utils.flop_counter counts operations", "yours"),
    "tensorboard": switched(_LOGS, "yours"),
    "wandb": switched(_LOGS, "yours"),
    "csv_monitor": switched(_LOGS, "yours"),
    "comet": switched(_LOGS, "yours"),
    "compile": switched("torch.compile the blocks of the model before it is wrapped", switch="deepcompile"),
    "tensor_parallel": switched("there is no tensor parallelism", switch="autotp_size", off=(0, 1, None)),
    "sequence_parallel_size": cannot("there is no sequence parallelism", 1),
    "seq_parallel_communication_data_type": unneeded("there is no sequence parallelism"),
    "data_parallel_size": unneeded("it follows from the number of ranks and pipeline="),
    "expert_parallel": switched("there is no expert parallelism"),
    "use_data_before_expert_parallelism": cannot("there is no expert parallelism", False),
    "autotuning": switched("distlib.suggest_partition finds the partition; the rest is measured by hand"),
    "hybrid_engine": switched("there is no inference engine"),
    "data_efficiency": switched("data is the script's"),
    "datastates_ckpt": cannot("distlib.save writes in the background itself"),
    "weight_quantization": switched("weights are not quantized", unsaid=True),
    # What DeepSpeed itself rejects since its release 0.19, whatever is in it
    "amp": switched("DeepSpeed has removed it: choose a precision", unsaid=True),
    "nebula": switched("DeepSpeed has removed it: distlib.save writes in the background", unsaid=True),
    "elasticity": switched("DeepSpeed has removed it: a checkpoint goes on with any number of ranks", unsaid=True),
    "sparse_gradients": cannot("gradients are dense", False),
    **dict.fromkeys(
        (
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "graph_harvesting",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
        ),
        switched("DeepSpeed has removed it, and distlib has none", unsaid=True),
    ),
}

CONFIGURATION = Section(KEYS, absent=lambda draft: {"gradient_clipping": 1.0})
