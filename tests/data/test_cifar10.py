import errno
import http.server
import os
import threading
import time

import pytest

from cifarnet.data import CIFAR10
from cifarnet.errors import UserError
from conftest import IMAGES_A_FILE

pytestmark = pytest.mark.usefixtures("published")


@pytest.fixture
def server(archive):
    """Serve /whole, /short (a third of the announced length) and /wrong."""
    content = archive["bytes"]
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            bodies = {"/whole": content, "/short": content[: len(content) // 3], "/wrong": content[:-1] + b"x"}
            name = "/" + self.path.split("/")[1]
            if name not in bodies:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(bodies[name])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield lambda path: f"http://127.0.0.1:{http_server.server_port}/{path}/cifar-10-python.tar.gz", requests
        http_server.shutdown()


def data(tmp_path, url="http://127.0.0.1:9/cifar-10-python.tar.gz"):
    return CIFAR10(root=str(tmp_path / "data"), url=url, batch_size=10)


def test_download_once_then_never_again(tmp_path, server):
    url, requests = server
    assert data(tmp_path, url("whole")).source  # read on first use
    before = len(requests)
    assert before > 0
    module = data(tmp_path, url("whole"))
    assert len(module.source.train) + len(module.source.val) == 5 * IMAGES_A_FILE
    assert len(requests) == before
    assert sorted(os.listdir(tmp_path / "data")) == [".lock", "cifar-10-batches-py", "cifar-10-python.tar.gz"]
    assert len(module.source.test) == IMAGES_A_FILE
    assert module.source.test.images.shape[1:] == (3, 32, 32)
    assert module.class_names[3] == "cat"


@pytest.mark.parametrize("path", ["short", "wrong", "missing"])
def test_failed_download_explains_and_leaves_nothing(tmp_path, server, archive, path):
    url, _ = server
    with pytest.raises(UserError) as error:
        assert data(tmp_path, url(path)).source
    message = str(error.value)
    by_hand = (str(tmp_path / "data"), "cifar-10-python.tar.gz", archive["md5"])
    for needed in (url(path), *by_hand, "data.url=", "data=synthetic"):
        assert needed in message
    assert os.listdir(tmp_path / "data") == [".lock"]
    assert data(tmp_path, url("whole")).source  # the next start works


def test_no_network(tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        assert data(tmp_path).source


def test_archive_put_there_by_hand(tmp_path, archive):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(archive["bytes"])
    module = data(tmp_path)
    assert len(module.source.test) == IMAGES_A_FILE


def test_wrong_archive_put_there_by_hand_is_kept(tmp_path, server, archive):
    (tmp_path / "data").mkdir()
    by_hand = tmp_path / "data" / "cifar-10-python.tar.gz"
    by_hand.write_bytes(archive["bytes"][:1000])
    with pytest.raises(UserError, match=r"differs from the published archive"):
        assert data(tmp_path, server[0]("whole")).source
    assert by_hand.read_bytes() == archive["bytes"][:1000]
    assert sorted(os.listdir(tmp_path / "data")) == [".lock", by_hand.name]


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_changed_or_missing_files_are_refused(tmp_path, server, name):
    assert data(tmp_path, server[0]("whole")).source
    member = tmp_path / "data" / "cifar-10-batches-py" / name
    member.write_bytes(member.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"cifar-10-batches-py differs from the published files. Delete it"):
        assert data(tmp_path).source
    member.unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-py differs from the published files. Delete it"):
        assert data(tmp_path).source


def test_two_first_starts_share_one_download(tmp_path, server, monkeypatch, capsys):
    """Each thread locks with a separate file descriptor, as processes do."""
    url, _ = server
    fetch, working = CIFAR10._fetch, []

    def slowly(self):
        working.append(self)
        time.sleep(0.5)
        fetch(self)

    monkeypatch.setattr(CIFAR10, "_fetch", slowly)
    first, second = data(tmp_path, url("whole")), data(tmp_path, url("whole"))
    thread = threading.Thread(target=first.read)
    thread.start()
    while not working:
        time.sleep(0.01)
    assert len(second.read().test) == IMAGES_A_FILE
    thread.join()
    assert working == [first]
    assert "Another process is preparing CIFAR-10" in capsys.readouterr().out


@pytest.mark.parametrize("function", ["download_url", "extract_archive"])
def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path, server, monkeypatch, archive, function):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "data" / ".unfinished-1").mkdir(parents=True)  # of a process that was killed
    with monkeypatch.context() as patch:
        patch.setattr(f"cifarnet.data.cifar10.{function}", fail)
        with pytest.raises(UserError, match=r"data: CIFAR-10 cannot be stored there \(No space left on device\)"):
            assert data(tmp_path, server[0]("whole")).source
    left = [".lock", "cifar-10-python.tar.gz"] if function == "extract_archive" else [".lock"]
    assert sorted(os.listdir(tmp_path / "data")) == left
    assert data(tmp_path, server[0]("whole")).source


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_a_file_instead_of_the_folder_is_refused(tmp_path, root):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be (created|stored)"):
        assert CIFAR10(root=str(tmp_path / root)).source
