"""Messages of libraries that do not apply to cifarnet are suppressed."""

from lightning.fabric.plugins.environments import SLURMEnvironment

from cifarnet.system.log_output import quiet_libraries


def test_advice_of_lightning_is_suppressed(tmp_path, monkeypatch, recwarn):
    """On a login node of a cluster, `srun` is installed but not used."""
    tmp_path.joinpath("srun").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    SLURMEnvironment.detect()
    assert "srun" in str(recwarn.pop(UserWarning).message)
    quiet_libraries()
    SLURMEnvironment.detect()
    assert not recwarn.list
