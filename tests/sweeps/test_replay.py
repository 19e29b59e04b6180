import os

import pytest

from cifarnet.errors import UserError
from cifarnet.sweeps.replay import checked
from conftest import OwnNetwork


@pytest.mark.parametrize(
    "line",
    [
        "+experiment=baseline",
        "+recipe=[mixup]",
        "optimizer=sgd,adamw",
        "optimizer.lr=0.1,0.2",
        "optimizer.lr=interval(0.1, 0.2)",
        "seed=range(3)",
        "model.widths=[4,4,8,8]",
        "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/accuracy}",
        "scheduler.total_iters=${total_steps}",
        "~logger",
        "hydra/launcher=parallel",
        "hydra.launcher.n_jobs=2",
        "hydra.launcher.partition='a,b'",
        "hydra.launcher.gres=gpu:2",
        "data.root=.",
        "hydra.sweeper.trials=3",
        "hydra.sweeper.pruner=null",
        "hydra.sweeper.sampler.seed=3",
        "hydra/job_logging=disabled",
        "hydra.verbose=true",
        "+hydra.sweeper.params.seed='1,2'",
        "sweep.keep_checkpoints=null",
        "+data.mix={_target_: cifarnet.recipes.mixup.Mixup, alpha: 0.2}",
    ],
)
def test_a_sweep_of_ones_own_is_repeated(line, tmp_path):
    assert checked([line], tmp_path) == [line]


@pytest.mark.parametrize(
    "line",
    [
        "+callbacks.x={_target_: torch.load, f: evil.pt, weights_only: false}",
        "+callbacks.x={_target_: torch.utils.collect_env.run, command: touch exploded}",
        "+recipe.x={_target_: torch.hub.load, repo_or_dir: a/b, model: c}",
        "+callbacks.x={_target_: joblib.load, filename: evil.pkl}",
        "+callbacks.x={_target_: numpy.load, file: evil.npy, allow_pickle: true}",
        "+callbacks.x={_target_: shutil.copy, src: /etc/hosts, dst: exploded}",
        "+callbacks.x={_target_: urllib.request.urlretrieve, url: 'http://127.0.0.1', filename: exploded}",
        "+callbacks.x._target_=os.system",
        "++callbacks.x._target_=os.mkdir,os.rmdir",
        "+data.mix.a.b=[{_target_: os.mkdir, path: exploded}]",
        "model=choice(cnn,{_target_: os.mkdir})",
        "optimizer._target_='torch.load'",
        "--config-dir=/tmp/evil",
        "-cd",
        "+experiment=../../../tmp/evil",
        "+experiment=[baseline,/tmp/evil]",
        "experiment@hydra.callbacks=baseline",
        "hydra.run.dir=../elsewhere",
        "hydra.launcher._target_=os.mkdir",
        "hydra.launcher.setup=[touch exploded]",
        "hydra.launcher.partition='x\ntouch exploded'",
        "hydra.launcher.submitit_folder=/tmp/evil",
        "+hydra.launcher.additional_parameters={wrap: touch}",
        "hydra.searchpath=[/tmp/evil]",
        "+hydra.callbacks.x={_target_: os.mkdir, path: exploded}",
        "hydra.job_logging.handlers.file.filename=exploded",
        "output_dir=elsewhere",
        "classes=[os.mkdir]",
        "ckpt_path=evil.ckpt",
        "callbacks.best.dirpath=/tmp",
        "callbacks.best.filename=../../exploded",
        "callbacks.best={_target_: lightning.pytorch.callbacks.ModelCheckpoint, _args_: [/tmp]}",
        "logger.save_dir=${oc.env:HOME}",
        "name=${oc.env:HOME}",
        "data.root=/nowhere/at/all",
        "optimizer.lr=[",
        "hydra.sweeper.pruner={_target_: os.mkdir, path: exploded}",
        "hydra.sweeper.sampler._target_=os.mkdir",
        "+hydra.sweeper.params.output_dir=elsewhere",
        "+hydra.sweeper.params.module='{tta: {_target_: os.mkdir, path: exploded}}'",
        "+hydra.sweeper.params.data.url=http://127.0.0.1",
        "+hydra.sweeper.params.classes='[os.mkdir]'",
        "logger.mlflow.tracking_uri=http://127.0.0.1",
        "+logger.x={_target_: lightning.pytorch.loggers.WandbLogger, entity: evil}",
        "data.url=http://127.0.0.1",
    ],
)
def test_a_strangers_sweep_brings_nothing_along(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        checked(["seed=1", line], tmp_path / "multirun.yaml")
    assert os.listdir(tmp_path) == []


def test_what_the_user_allows_may_be_named(tmp_path):
    line = "+model._target_=conftest.OwnNetwork"
    with pytest.raises(UserError, match="classes="):
        checked([line], tmp_path)
    assert checked([line], tmp_path, [OwnNetwork]) == [line]
