"""A small server that W&B's client can talk to: sweeps, runs and artifacts, as far as the tests ask for them.

It keeps what it was sent, so that a test reads it back. What it does not know it answers by an error, and keeps in
``unknown``. What the real server decides, such as who may write where, it does not imitate.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import yaml

ENTITY, SWEEP = "me", "sweep1"
_Said = dict[str, Any]
_KEPT = {
    "wandb-history.jsonl": "historyLineCount",
    "wandb-events.jsonl": "eventsLineCount",
    "output.log": "logLineCount",
}


@dataclass
class Run:
    """What was told of a run."""

    project: str
    upserts: list[_Said] = field(default_factory=list)
    posts: dict[str, list[tuple[int, list[str]]]] = field(default_factory=dict)  # by file: where the lines begin, lines
    exit_codes: list[int] = field(default_factory=list)
    made: list[str] = field(default_factory=list)  # the versions of artifacts that it logged
    used: list[str] = field(default_factory=list)

    def said(self, name: str) -> Any:
        """Return what was last said under a name of the upserts, such as "tags"."""
        return next((each[name] for each in reversed(self.upserts) if each.get(name)), None)

    @property
    def config(self) -> _Said:
        """The configuration, without W&B's own part."""
        return {key: each["value"] for key, each in json.loads(self.said("config")).items() if key != "_wandb"}

    def lines(self, file: str) -> list[_Said]:
        """Return the lines of a file of rows, in the order in which they came."""
        return [json.loads(line) for _, lines in self.posts.get(file, []) for line in lines]

    @property
    def history(self) -> list[_Said]:
        """The rows; each post of some says behind how many it belongs."""
        posts = self.posts.get("wandb-history.jsonl", [])
        counts = [len(lines) for _, lines in posts]
        assert [at for at, _ in posts] == [sum(counts[:k]) for k in range(len(counts))]
        return self.lines("wandb-history.jsonl")

    @property
    def summary(self) -> _Said:
        """The last number of everything."""
        return (self.lines("wandb-summary.json") or [{}])[-1]


@dataclass
class Version:
    """A version of an artifact: which one of ``place``, its collection."""

    id: str
    place: tuple[str, str, str]  # entity, project, name
    kind: str
    digest: str
    index: int
    state: str = "PENDING"


class WandbServer:
    """Listens at ``url`` while it is entered."""

    def __init__(self) -> None:
        self.sweep = ""  # its configuration, as it was sent
        self.trials: dict[str, _Said] = {}  # what an agent is given, one after the other: parameters by the run's id
        self.stopped: set[str] = set()  # trials that are to be stopped once they have told anything
        self.runs: dict[str, Run] = {}
        self.versions: dict[str, Version] = {}  # of artifacts, by id
        self.files: dict[str, bytes] = {}  # what was uploaded, by its name
        self.unknown: list[str] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        cast(Any, self._http).owner = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that is to talk to this server, and to nobody else."""
        return {**{k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}, **self.variables}

    @property
    def variables(self) -> dict[str, str]:
        """Those of W&B's variables that lead to this server, and to nobody else."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}

    # Answers, called with the lock held.

    def answer(self, query: str, variables: _Said) -> _Said:
        """Return what GraphQL answers."""
        named = re.match(r"\s*(?:query|mutation)\s+(\w+)", query)
        name = named[1] if named else query.strip()[:40]
        said = variables.get("input", variables)
        answers = {
            "Viewer": self._viewer, "ServerFeaturesQuery": self._features,
            "OrganizationCoreWeaveOrganizationID": self._organization,
            "UpsertBucket": self._upsert, "RunResumeStatus": self._resume, "CreateRunFiles": self._run_files,
            "ArtifactType": self._artifact_type, "CreateArtifact": self._create,
            "CreateArtifactManifest": self._manifest, "CreateArtifactFiles": self._artifact_files,
            "CommitArtifact": self._commit, "ArtifactByID": self._artifact_by_id, "UseArtifact": self._use,
            "UpsertSweep": self._upsert_sweep, "SweepWithRuns": self._sweep_with_runs,
            "CreateAgent": lambda _: {"createAgent": {"agent": {"id": "agent"}}}, "Heartbeat": self._heartbeat,
        }  # fmt: skip
        return {"data": answers[name](said)}

    def _viewer(self, _: _Said) -> _Said:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        who = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": teams}
        return {"viewer": who}

    def _features(self, _: _Said) -> _Said:
        return {"serverInfo": {"features": []}}

    def _organization(self, _: _Said) -> _Said:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _upsert(self, said: _Said) -> _Said:
        new = said["name"] not in self.runs
        run = self.runs.setdefault(said["name"], Run(said.get("project") or ""))
        run.upserts.append(said)
        return {"upsertBucket": {"bucket": {**self._bucket(said["name"])}, "inserted": new}}

    def _bucket(self, name: str) -> _Said:
        run = self.runs[name]
        project = {"id": "1", "name": run.project, "entity": {"id": "1", "name": ENTITY}}
        counts = {count: sum(len(lines) for _, lines in run.posts.get(file, [])) for file, count in _KEPT.items()}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]"}
        told = {"id": name, "name": name, "displayName": run.said("displayName"), "sweepName": run.said("sweep")}
        return {
            **told, **counts, **tails, "project": project, "config": run.said("config"), "tags": run.said("tags"),
            "summaryMetrics": json.dumps(run.summary), "notes": run.said("notes"), "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip

    def _resume(self, said: _Said) -> _Said:
        bucket = self._bucket(said["name"]) if said["name"] in self.runs else None
        return {"model": {"id": "1", "name": said["project"], "entity": {"id": "1", "name": ENTITY}, "bucket": bucket}}

    def _run_files(self, said: _Said) -> _Said:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{said['run']}/{name}"} for name in said["files"]]
        return {"createRunFiles": {"runID": said["run"], "uploadHeaders": [], "files": files}}

    def _upsert_sweep(self, said: _Said) -> _Said:
        self.sweep = said["config"]
        project = {"id": "1", "name": said["projectName"], "entity": {"id": "1", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": SWEEP, "project": project}, "configValidationWarnings": []}}

    def _sweep_with_runs(self, _: _Said) -> _Said:
        told = {"id": SWEEP, "name": SWEEP, "method": "grid", "state": "RUNNING", "config": self.sweep}
        return {"project": {"sweep": {**told, "runs": {"edges": []}}}}

    def _heartbeat(self, said: _Said) -> _Said:
        running = json.loads(said["runState"])
        told = [name for name in running if name in self.stopped and name in self.runs and self.runs[name].history]
        commands: list[_Said] = [{"type": "stop", "run_id": name} for name in told]
        if not running:  # an agent has one trial at a time
            trial = next(iter(self.trials.items()), None)
            commands = [{"type": "exit"}]
            if trial is not None:
                self.trials.pop(trial[0])
                values = {key: {"value": value} for key, value in trial[1].items()}
                program = yaml.safe_load(self.sweep)["program"]
                commands = [{"type": "run", "run_id": trial[0], "program": program, "args": values}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    # A version is known by its files within a collection: logged again, or used by another run, it is the same one.

    def _create(self, said: _Said) -> _Said:
        place = said["entityName"], said["projectName"], said["artifactCollectionName"]
        siblings = [v for v in self.versions.values() if v.place == place]
        found = next((v for v in siblings if v.digest == said["digest"]), None)
        if found is None:
            found = Version(f"A{len(self.versions)}", place, said["artifactTypeName"], said["digest"], len(siblings))
            self.versions[found.id] = found
        if said["runName"] is not None:  # None where it is not logged, but about to be used
            self.runs[said["runName"]].made.append(found.id)
        latest = next(({"id": v.id} for v in reversed(siblings) if v.state == "COMMITTED"), None)
        told = {"id": found.id, "state": found.state, "artifactSequence": {"latestArtifact": latest}}
        return {"createArtifact": {"artifact": told}}

    def _manifest(self, said: _Said) -> _Said:
        name = f"manifest/{said['artifactID']}"
        file = {"id": name, "uploadUrl": f"{self.url}/upload/{name}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": name, "file": file}}}

    def _artifact_files(self, said: _Said) -> _Said:
        nodes = [
            {
                "storagePath": f"{each['artifactID']}/{each['name']}", "uploadHeaders": [],
                "uploadUrl": f"{self.url}/upload/{each['artifactID']}/{each['name']}",
                "artifact": {"id": each["artifactID"]}, "uploadMultipartUrls": None,
            }
            for each in said["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _commit(self, said: _Said) -> _Said:
        version = self.versions[said["artifactID"]]
        version.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": version.id, "digest": version.digest}}}

    def _use(self, said: _Said) -> _Said:
        self.runs[said["runName"]].used.append(said["artifactID"])
        return {"useArtifact": {"artifact": {"id": said["artifactID"]}}}

    def _artifact_type(self, said: _Said) -> _Said:
        name = said["name"].partition(":")[0]
        kinds = [v.kind for v in self.versions.values() if v.place == (said["entity"], said["project"], name)]
        return {"project": {"artifact": {"artifactType": {"name": kinds[0]}} if kinds else None}}

    def _artifact_by_id(self, said: _Said) -> _Said:
        version = self.versions[said["id"]]
        entity, project, name = version.place
        at = {"id": "1", "internalId": "1", "name": project, "entity": {"name": entity}}
        empty = ("description", "metadata", "historyStep", "commitHash", "updatedAt")
        told = {
            "id": version.id, "artifactSequence": {"name": name, "project": at}, "versionIndex": version.index,
            "artifactType": {"name": version.kind}, "state": version.state, "size": 1, "digest": version.digest,
            "fileCount": 1, "createdAt": "2020-01-01T00:00:00", "ttlDurationSeconds": -2, "ttlIsInherited": False,
            "tags": [], "aliases": [], **dict.fromkeys(empty),
        }  # fmt: skip
        return {"artifact": told}

    def stream(self, run: str, said: _Said) -> _Said:
        """Take rows, and what else is told in pieces."""
        for file, piece in said.get("files", {}).items():
            self.runs[run].posts.setdefault(file, []).append((piece["offset"], piece["content"]))
        if said.get("complete"):
            self.runs[run].exit_codes.append(said["exitcode"])
        return {"limits": {}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def owner(self) -> WandbServer:
        return cast(Any, self.server).owner

    def do_POST(self) -> None:
        body = self._body()
        said = json.loads(body)
        with self.owner._lock:
            try:
                if self.path == "/graphql":
                    found = self.owner.answer(said["query"], said.get("variables") or {})
                elif part := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                    found = self.owner.stream(part[1], said)
                else:
                    raise LookupError(self.path)
            except (LookupError, TypeError, ValueError) as error:  # else the client would ask again, for a minute
                self.owner.unknown.append(f"{error!r} for {said}")
                found = {"data": None, "errors": [{"message": repr(error)}]}
        self._reply(json.dumps(found).encode())

    def do_PUT(self) -> None:
        body = self._body()
        with self.owner._lock:
            self.owner.files[self.path.removeprefix("/upload/")] = body
        self._reply(b"")

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
