"""Pushes that are disturbed at each request of the protocol: they complete, or leave the repository as it was."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from huggingface_hub import HfApi

from hfcompress.hub import PushError, retries
from hfcompress.hub.push import send_folder
from tests.local_hub import TOKEN, Answer, Fault

WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": b"{}\n", "model.safetensors": WEIGHTS, "README.md": b"---\nlicense: mit\n---\n# Small\n"}
ALWAYS = 10**6


@dataclass(frozen=True)
class Scenario:
    """A push: what is there before, and how it is asked for."""

    there: bool
    options: dict
    requests: int

    def target(self, hub, repo, before):
        """The branch or pull request that the push leads to."""
        if self.options.get("create_pr"):
            new = sorted(hub.heads(repo).keys() - before.keys())
            assert len(new) == 1
            return new[0]
        return self.options.get("revision", "main")


SCENARIOS = {
    "new": Scenario(False, {"private": True}, 9),
    "again": Scenario(True, {}, 7),
    "branch": Scenario(True, {"revision": "v1"}, 11),
    "pull request": Scenario(True, {"create_pr": True}, 8),
}
PASSING = {
    "500": {"status": 500},
    "503": {"status": 503},
    "429": {"status": 429, "headers": {"Retry-After": "7"}},
    "dropped": {"drop": True},
    "answer lost": {"drop": True, "carry_out": True},
    "timeout": {"drop": True, "hang_s": 30},
    "timeout, carried out": {"drop": True, "carry_out": True, "hang_s": 30},
}
REFUSALS = (401, 403, 404, 409)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def prepare(hub, scenario, repo):
    """The repository as it is before the push, and its heads."""
    hub.heal()
    if scenario.there:
        old = {"config.json": b'{"old": 1}\n', "model-00001-of-00001.safetensors": b"old weights", "notes.txt": b"mine"}
        hub.create_repo(repo, files=old)
    return hub.heads(repo)


def require_complete(hub, scenario, repo, before):
    """Everything is there, by one commit, and nothing else happened."""
    target = scenario.target(hub, repo, before)
    files = hub.files(repo, target)
    assert {name: files[name] for name in FILES if name != "README.md"} == {
        name: content for name, content in FILES.items() if name != "README.md"
    }
    assert b"sha256" in files["README.md"] and b"# Small" in files["README.md"]
    assert "model-00001-of-00001.safetensors" not in files and ("notes.txt" in files) == scenario.there
    commits = hub.commits(repo, target)
    assert len(commits) == 2
    after = hub.heads(repo)
    assert {name: after[name] for name in before if name != target} == {n: before[n] for n in before if n != target}
    assert len(after) <= len(before) + 1


def require_unchanged(hub, scenario, repo, before, error):
    """No commit; what was created says the error."""
    message = str(error)
    assert len(message.splitlines()) == 1 and TOKEN not in message and message.startswith(f"{repo} was not pushed: ")
    after = hub.heads(repo)
    assert {name: after.get(name) for name in before} == before
    for name in after.keys() - before.keys():  # an empty repository, or a branch that is as main
        assert name == ("main" if not scenario.there else "v1")
        assert set(hub.files(repo, name)) == ({".gitattributes"} if not scenario.there else set(hub.files(repo)))
        assert ("and empty" if not scenario.there else "the branch v1") in message
    if after == before and "may be" not in message:
        assert "nothing there was changed" in message


def requests_of_a_push(hub, scenario, folder, repo):
    """Method and path of each request of an undisturbed push, with how many like it came before."""
    before, first = prepare(hub, scenario, repo), len(hub.requests)
    send_folder(folder, repo, **scenario.options)
    require_complete(hub, scenario, repo, before)
    found = [(request.method, request.path) for request in hub.requests[first:]]
    assert len(found) == scenario.requests
    return [(method, path, found[:number].count((method, path))) for number, (method, path) in enumerate(found)]


def disturb(hub, method, path, repo, clean, earlier, **fault):
    pattern = re.escape(path).replace(re.escape(clean), re.escape(repo))
    hub.inject(method, f"^{pattern}$", skip=earlier, **fault)


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_passes_is_waited_for(name, fault, folder, local_hub, backoff_waits, monkeypatch):
    """Each request fails once."""
    scenario, cases = SCENARIOS[name], 0
    if "timeout" in fault:
        monkeypatch.setattr(retries, "TIME_LIMITS_S", (5.0, 0.3, 5.0, 5.0))
    for number, (method, path, earlier) in enumerate(requests_of_a_push(local_hub, scenario, folder, "tester/clean")):
        repo = f"tester/once-{number}"
        before, first = prepare(local_hub, scenario, repo), len(local_hub.requests)
        backoff_waits.clear()
        disturb(local_hub, method, path, repo, "tester/clean", earlier, times=1, **PASSING[fault])
        began = time.monotonic()
        commit = send_folder(folder, repo, **scenario.options)
        assert time.monotonic() - began < PASSING["timeout"]["hang_s"]  # the Hub was not waited for
        require_complete(local_hub, scenario, repo, before)
        assert commit.oid == local_hub.heads(repo)[scenario.target(local_hub, repo, before)]
        assert bool(commit.pr_url) == (name == "pull request")
        assert len(backoff_waits) == 1 and backoff_waits[0] >= (7 if fault == "429" else 0.7)
        uploads = [request for request in local_hub.requests[first:] if request.method == "PUT"]
        assert len(uploads) == 1 + (method == "PUT")
        cases += 1
    assert cases == scenario.requests


@pytest.mark.parametrize(
    "fault", [fault for fault in PASSING if fault != "timeout, carried out"]
)  # by then as an answer that is lost
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_does_not_pass_leaves_the_repository_as_it_was(name, fault, folder, local_hub, backoff_waits, monkeypatch):
    """Each request fails for good. Where it is carried out all the same, the push may complete."""
    scenario, completed, refused = SCENARIOS[name], 0, 0
    if "timeout" in fault:
        monkeypatch.setattr(retries, "TIME_LIMITS_S", (5.0, 0.05, 5.0, 5.0))
    clean = requests_of_a_push(local_hub, scenario, folder, "tester/clean")
    for number, (method, path, earlier) in enumerate(clean):
        repo = f"tester/always-{number}"
        before = prepare(local_hub, scenario, repo)
        disturb(local_hub, method, path, repo, "tester/clean", earlier, times=ALWAYS, **PASSING[fault])
        backoff_waits.clear()
        try:
            send_folder(folder, repo, **scenario.options)
        except PushError as error:
            require_unchanged(local_hub, scenario, repo, before, error)
            assert "push again" in str(error) and 4 <= len(backoff_waits) <= 5
            refused += 1
        else:
            assert PASSING[fault].get("carry_out")
            require_complete(local_hub, scenario, repo, before)
            completed += 1
        local_hub.heal()
        send_folder(folder, repo, **scenario.options)  # and then it goes on
        if name != "pull request" or not completed:
            require_complete(local_hub, scenario, repo, before)
    assert completed + refused == scenario.requests and refused >= scenario.requests - 4


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_refused_is_not_tried_again(name, status, folder, local_hub, backoff_waits):
    scenario, cases = SCENARIOS[name], 0
    for number, (method, path, earlier) in enumerate(requests_of_a_push(local_hub, scenario, folder, "tester/clean")):
        repo = f"tester/refused-{number}"
        before = prepare(local_hub, scenario, repo)
        disturb(local_hub, method, path, repo, "tester/clean", earlier, times=1, status=status)
        with pytest.raises(PushError) as caught:
            send_folder(folder, repo, **scenario.options)
        require_unchanged(local_hub, scenario, repo, before, caught.value)
        assert backoff_waits == []
        cases += 1
    assert cases == scenario.requests


@pytest.mark.parametrize("carry_out", [False, True])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_push_goes_on(name, carry_out, folder, local_hub):
    """The process is killed while it waits for each answer; the next push completes, and sends nothing twice."""
    scenario, cases = SCENARIOS[name], 0
    for number, (method, path, earlier) in enumerate(requests_of_a_push(local_hub, scenario, folder, "tester/clean")):
        repo = f"tester/killed-{number}"
        before, first = prepare(local_hub, scenario, repo), len(local_hub.requests)
        fault = {"drop": True, "carry_out": carry_out, "hang_s": 60}
        disturb(local_hub, method, path, repo, "tester/clean", earlier, times=1, **fault)
        child = os.fork()
        if child == 0:
            send_folder(folder, repo, **scenario.options)
            os._exit(0)
        deadline = time.monotonic() + 30
        while len(local_hub.requests) <= first + number:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        landed = carry_out and "/commit/" in path
        if not landed:
            assert {name: local_hub.heads(repo).get(name) for name in before} == before
        if not (landed and name == "pull request"):  # a pull request that was opened is not looked for by the next push
            send_folder(folder, repo, **scenario.options)
        require_complete(local_hub, scenario, repo, before)
        uploads = [request for request in local_hub.requests[first:] if request.method == "PUT"]
        assert len(uploads) == 1 + (method == "PUT" and not carry_out)
        cases += 1
    assert cases == scenario.requests


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_hub_that_goes_away_for_good(name, folder, local_hub, backoff_waits):
    """From each request on nothing is answered any more."""
    scenario, cases = SCENARIOS[name], 0
    for number, _ in enumerate(requests_of_a_push(local_hub, scenario, folder, "tester/clean")):
        repo = f"tester/away-{number}"
        before = prepare(local_hub, scenario, repo)
        local_hub.inject("*", ".", skip=number, times=ALWAYS, drop=True)
        with pytest.raises(PushError, match="the Hub cannot be reached") as caught:
            send_folder(folder, repo, **scenario.options)
        if number < scenario.requests - 2:
            require_unchanged(local_hub, scenario, repo, before, caught.value)
        else:  # committing began (the client has the card looked at first), and nobody can be asked what became of it
            assert local_hub.heads(repo)["main"] == (before or local_hub.heads(repo))["main"]
            assert "whether the commit arrived is not known; push again to be sure" in str(caught.value)
        local_hub.heal()
        send_folder(folder, repo, **scenario.options)
        require_complete(local_hub, scenario, repo, before)
        cases += 1
    assert cases == scenario.requests


@pytest.mark.parametrize("name", ["new", "again", "branch"])
def test_a_commit_that_arrived_before_the_hub_went_away_is_found_by_the_next_push(
    name, folder, local_hub, backoff_waits
):
    scenario, repo = SCENARIOS[name], "tester/late"
    before = prepare(local_hub, scenario, repo)
    local_hub.inject("POST", "/commit/", times=1, drop=True, carry_out=True)
    local_hub.inject("*", ".", skip=scenario.requests - 1, times=ALWAYS, drop=True)
    with pytest.raises(PushError, match="whether the commit arrived is not known; push again to be sure"):
        send_folder(folder, repo, **scenario.options)
    local_hub.heal()
    head = local_hub.heads(repo)[scenario.target(local_hub, repo, before)]
    assert send_folder(folder, repo, **scenario.options).oid == head
    require_complete(local_hub, scenario, repo, before)


@pytest.mark.parametrize("options", [{}, {"revision": "v1"}])
def test_somebody_elses_commit_is_never_overwritten(options, folder, local_hub, monkeypatch):
    """It happens after this push looked, and before it commits."""
    branch, upload = options.get("revision", "main"), HfApi.preupload_lfs_files
    local_hub.create_repo("tester/two", files={"config.json": b"{}"})
    if options:
        send_folder(folder, "tester/two", **options)
        (folder / "config.json").write_bytes(b'{"mine": 1}')

    def late(*args, **kwargs):
        upload(*args, **kwargs)
        local_hub.overwrite("tester/two", "config.json", b'{"theirs": 1}', revision=branch)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", late)
    with pytest.raises(
        PushError, match="somebody else committed to it meanwhile; look at what is there, and push again"
    ):
        send_folder(folder, "tester/two", **options)
    assert local_hub.files("tester/two", branch)["config.json"] == b'{"theirs": 1}'
    assert local_hub.commits("tester/two", branch)[0].title == "Change config.json"


def test_a_new_branch_is_not_made_of_what_moved_meanwhile(folder, local_hub, monkeypatch):
    """Files that were found unchanged on main may not be so on a branch that begins elsewhere."""
    local_hub.create_repo("tester/moved", files=FILES)
    before, upload = local_hub.heads("tester/moved"), HfApi.preupload_lfs_files

    def late(*args, **kwargs):
        local_hub.overwrite("tester/moved", "config.json", b'{"theirs": 1}')
        upload(*args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", late)
    with pytest.raises(PushError, match="tester/moved was not pushed: somebody else committed to it meanwhile"):
        send_folder(folder, "tester/moved", revision="v1")
    assert set(local_hub.heads("tester/moved")) == set(before) == {"main"}


def test_a_commit_that_arrives_late_is_not_made_twice(folder, local_hub, backoff_waits, monkeypatch):
    """The connection broke, the branch was looked at, and only then the first commit was carried out."""
    look, sent = HfApi.list_repo_commits, []
    commit = HfApi.create_commit

    def remember(*args, **kwargs):
        sent.append((args, kwargs))
        return commit(*args, **kwargs)

    def look_too_early(*args, **kwargs):
        found = look(*args, **kwargs)
        if len(found) == 1:
            args, kwargs = sent[0]
            commit(*args, **kwargs)
            for operation in args[2]:
                operation._is_committed = False
        return found

    monkeypatch.setattr(HfApi, "create_commit", remember)
    monkeypatch.setattr(HfApi, "list_repo_commits", look_too_early)
    local_hub.inject("POST", "/commit/", times=1, drop=True)
    done = send_folder(folder, "tester/late")
    assert len(sent) == 2 and len(local_hub.commits("tester/late")) == 2
    assert done.oid == local_hub.heads("tester/late")["main"]


def test_two_pushes_at_once(tmp_path, local_hub):
    """One commit after the other, or one of them stops; what is there is the whole of one of them."""
    local_hub.create_repo("tester/race")
    folders = []
    for number in range(6):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        for name in ("config.json", "model.safetensors"):
            (folders[-1] / name).write_bytes(b"%d" % number)
    with ThreadPoolExecutor(6) as pool:
        outcomes = [future.exception() for future in [pool.submit(send_folder, f, "tester/race") for f in folders]]
    assert all(error is None or "somebody else committed to it meanwhile" in str(error) for error in outcomes)
    done = outcomes.count(None)
    assert done >= 1 and len(local_hub.commits("tester/race")) == 1 + done
    for commit in local_hub.commits("tester/race")[:-1]:
        assert commit.files["config.json"].content == commit.files["model.safetensors"].content


def test_what_did_not_change_makes_no_commit(folder, local_hub):
    first = send_folder(folder, "tester/same")
    sent = sum(request.size_bytes for request in local_hub.requests_to("PUT", "/storage/"))
    assert sent == len(WEIGHTS)
    assert send_folder(folder, "tester/same").oid == first.oid
    again = send_folder(folder, "tester/same", create_pr=True)
    assert again.oid == first.oid and again.pr_url is None
    assert sum(request.size_bytes for request in local_hub.requests_to("PUT", "/storage/")) == sent
    assert set(local_hub.heads("tester/same")) == {"main"} and len(local_hub.commits("tester/same")) == 2


def test_a_long_wait_is_not_waited_for(folder, local_hub, backoff_waits):
    local_hub.inject("POST", "/api/repos/create", status=429, headers={"Retry-After": "3600"}, times=1)
    with pytest.raises(PushError, match="the Hub asks for fewer requests; push again later"):
        send_folder(folder, "tester/busy")
    assert backoff_waits == []


def test_an_error_page_is_no_answer(folder, local_hub, backoff_waits, monkeypatch):
    """Before a busy Hub stands a proxy that answers in HTML; the client expects JSON where it lets cards be looked at."""
    answer = Fault.answer
    monkeypatch.setattr(
        Fault, "answer", lambda self: Answer(502, b"<html>Bad gateway</html>") if self else answer(self)
    )
    local_hub.inject("POST", "/api/validate-yaml", times=2)
    send_folder(folder, "tester/proxied")
    assert len(backoff_waits) == 2 and len(local_hub.commits("tester/proxied")) == 2


def test_each_wait_is_logged_and_longer(folder, local_hub, backoff_waits, caplog):
    local_hub.inject("POST", "/commit/", times=4)
    with caplog.at_level("WARNING", logger="hfcompress.hub.retries"):
        send_folder(folder, "tester/busy")
    assert len(backoff_waits) == 4
    for wait_s, expected in zip(backoff_waits, (1, 2, 4, 8), strict=True):
        assert 0.75 * expected <= wait_s <= 1.25 * expected
    lines = [record.getMessage() for record in caplog.records if record.name == "hfcompress.hub.retries"]
    assert lines == [
        f"committing to tester/busy: the Hub answered 503; trying again in {wait_s:.1f} s ({number} of 5)"
        for number, wait_s in enumerate(backoff_waits, 1)
    ]
