"""The state of training that Lightning does not save, so that a resumed run matches an uninterrupted one."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifarnet.classifier import Classifier
from cifarnet.data.loader import Batch, BatchLoader
from cifarnet.system.distributed import all_gather, rank


class TrainingState(Callback):
    """Passes the losses of each batch to the loader, and saves the state that is needed to resume within an epoch: the
    position of the loader, the sums of the metrics, and the state of torch's random generators on every rank.

    `build` adds it to every run as the first callback, because others may save a checkpoint at the end of a batch.
    """

    def __init__(self) -> None:
        self.loader: BatchLoader | None = None
        self.module: Classifier | None = None
        self.restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        assert isinstance(trainer.train_dataloader, BatchLoader)
        self.module, self.loader = pl_module, trainer.train_dataloader
        if self.restored is None:
            return
        self.loader.restore(self.restored["loader"])
        sums: Tensor = self.restored["train_sums"]  # summed over all ranks
        self.module.sums["train"] = sums.to(self.module.device) * (rank() == 0)
        generators = self.restored["generators"]
        if rank() < len(generators):
            torch.set_rng_state(generators[rank()]["cpu"].cpu())
            if self.module.device.type == "cuda" and "cuda" in generators[rank()]:
                torch.cuda.set_rng_state(generators[rank()]["cuda"].cpu(), self.module.device)
        else:  # the previous session had fewer ranks
            self.module.seed_epoch()
        self.restored = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.loader is not None and self.loader.selects:
            self.loader.observe(batch.index, outputs["losses"])

    def state_dict(self) -> dict[str, Any]:
        if self.loader is None or self.module is None:
            return {}
        states = {"cpu": all_gather(torch.get_rng_state())}
        if self.module.device.type == "cuda":
            states["cuda"] = all_gather(torch.cuda.get_rng_state(self.module.device))
        return {
            "loader": self.loader.position(),
            "train_sums": self.module.total("train"),
            "generators": [dict(zip(states, one_rank, strict=True)) for one_rank in zip(*states.values(), strict=True)],
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the recorded paths of the run's checkpoints with the files in the run's folder.

        The run's folder may have been moved. No path is used from the checkpoint, because Lightning removes the files
        that these paths name.
        """
        folder = Path(trainer.default_root_dir) / "checkpoints"
        files = [path for path in folder.rglob("*.ckpt") if path.is_file() and not path.is_symlink()]

        def moved(path: str) -> str:
            found = [file for file in files if f"/{path}".endswith(f"/{file.relative_to(folder).as_posix()}")]
            return str(max(found, key=lambda file: len(file.parts), default=""))

        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[name] = moved(state.get(name, ""))
                state["dirpath"] = str(folder)
                scores = {moved(path): score for path, score in state["best_k_models"].items()}
                state["best_k_models"] = {path: score for path, score in scores.items() if path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict or None
