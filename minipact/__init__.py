"""minipact: model merging from task arithmetic to PACT. A name loads its room when it is first asked for."""

from importlib import import_module

from minipact.version import __version__

ROOMS = {  # room -> names; __init__.pyi says the same to type checkers
    "checkpoints": "open_checkpoint",
    "compression": "compress",
    "data_statistics": "fisher gradient_magnitudes input_covariances",
    "diagnostics": "ablate_subspace axis_profile hidden_interference intrusion_energy lbw_basis "
    "lbw_similarity random_subspace shield_basis singular_task_interference",
    "errors": "CheckpointError MergeError",
    "job": "merge_files recorded",
    "least_squares": "fisher_merge pave regmean swudi",
    "lbw_weights": "LBWMasks benjamini_hochberg cohens_d enrichment lbw_mask overwrite permutation_test",
    "lora": "Lora extract_lora to_lora",
    "lora_files": "merge_to_lora",
    "measuring": "measure_file",
    "merging": "METHODS Merged Sweep merge sweep",
    "methods": "Method Walls ace dare iso_c iso_cts load_bearing_walls pact register sift "
    "task_arithmetic ties tsv_m wiener wudi",
    "output": "save_checkpoint",
    "per_task": "emr emr_decompress tall tall_decompress tsv_compress tsv_decompress",
    "recipe": "Recipe",
    "statistics_files": "StatisticsFile open_statistics save_statistics",
    "steps": "Step default_policy",
    "stored": "Served Stored open_stored",
    "stored_files": "compress_files extract_file",
    "task_vectors": "TaskVector merged_delta task_vector",
    "training": "Coefficients atlas atm_step masked talos_mask",
    "whole_vector": "awd consensus knots tatr",
}
HOMES = {name: room for room, names in ROOMS.items() for name in names.split()}
REPLACED = {  # names of 0.1.0 without a successor of the same kind
    "plan": "Merged(base, tasks, ...), which checks at once and computes when asked",
    "Plan": "Merged",
    "merge_iter": "Merged(base, tasks, ...).items()",
    "threads": "merge(..., threads=N), or Merged(...).map(..., threads=N)",
}
__all__ = ["__version__", *HOMES]


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(import_module(f"minipact.{HOMES[name]}"), name)
    if name in REPLACED:
        raise AttributeError(f"minipact.{name} is gone since 0.2.0: use {REPLACED[name]}")
    raise AttributeError(f"module 'minipact' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
