"""One recipe and one target file make what each cluster takes, and what does not fit is said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from step_jax.cli.launch import submit
from step_jax.core.errors import EXITS, ConfigError, StepError, exit_of
from step_jax.launch import slices
from step_jax.launch.job import Job, Rendered, check_name, name_of
from step_jax.launch.ranks import shell_code
from step_jax.launch.supervisor import Restarts
from step_jax.launch.target import Target, grace_s, load_target, longest_save
from step_jax.planning.topology import TPUS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "targets"
TARGETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
RECIPE = "run:\n  directory: '/shared/it''s $HOME `x`'\ntraining:\n  steps: 8\n"


def job(**changes) -> Job:
    given = dict(
        name="small",
        loop="pretrain",
        recipe=RECIPE,
        environment={"JAX_PLATFORMS": "tpu,cpu", "QUOTED": "a b'$c"},
        restarts=Restarts(budget=3),
        grace_s=210,
        folder=Path("/shared/launches/small"),
    )
    return Job(**(given | changes))


def target(name: str) -> Target:
    return load_target(FOLDER / f"{name}.yaml")


def written(tmp_path: Path, text: str) -> Target:
    (tmp_path / "target.yaml").write_text(text)
    return load_target(tmp_path / "target.yaml")


# --- GKE ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load(target("gke").place.render(job()).files["jobset.yaml"])


def known_to_kubernetes(document: dict) -> dict:
    """What is left of a JobSet of the fields that its API has, in its types."""
    # two seconds, in every process that collects tests
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    parsed = JobsetV1alpha2JobSet.from_dict(document)
    assert parsed is not None
    return json.loads(parsed.to_json())


def test_a_jobset_has_only_fields_that_its_api_has_in_their_types(jobset):
    assert known_to_kubernetes(jobset) == jobset


def test_a_misspelt_field_of_a_jobset_is_found(jobset):
    bad = json.loads(json.dumps(jobset))
    pod = bad["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["terminationGracePeriod"] = pod.pop("terminationGracePeriodSeconds")
    assert known_to_kubernetes(bad) != bad


def test_a_jobset_takes_whole_slices_through_the_queue_without_privilege(jobset):
    job_ = jobset["spec"]["replicatedJobs"][0]
    spec = job_["template"]["spec"]
    pod = spec["template"]["spec"]
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job_["replicas"] == 2 and spec["parallelism"] == spec["completions"] == 16
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["securityContext"]["privileged"] is False
    assert "hostNetwork" not in pod
    assert pod["terminationGracePeriodSeconds"] == 210


def run_rules(jobset: dict, code: int) -> str:
    """What the controllers of Jobs and JobSets do about a container's exit code."""
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        on = rule.get("onExitCodes")
        if on and (code in on["values"]) == (on["operator"] == "In"):
            reason = "PodFailurePolicy"
            message = (
                f"Container {on['containerName']} for pod default/small-slice-0-0-abcde failed "
                f"with exit code {code} matching {rule['action']} rule at index {index}"
            )
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("code", [c for c in (*EXITS, 2, 135, 139, 190) if c])
def test_the_rules_of_a_jobset_do_what_the_table_of_exit_codes_says(jobset, code):
    wanted = {
        "free": "RestartJobSetAndIgnoreMaxRestarts",
        "counted": "RestartJobSet",
        "never": "FailJobSet",
    }
    assert run_rules(jobset, code) == wanted[exit_of(code).again]


def test_lists_of_exit_codes_are_as_kubernetes_wants_them(jobset):
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    for rule in spec["podFailurePolicy"]["rules"]:
        values = rule.get("onExitCodes", {"values": [1]})["values"]
        assert values == sorted(set(values)) and len(values) <= 255 and 0 not in values


def test_the_recipe_comes_whole_and_the_process_is_the_trainer_itself(jobset):
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"step-jax/recipe": RECIPE}
    command = template["spec"]["containers"][0]["command"]
    # the pod's start, but for the limit, which needs a capability: SIGTERM reaches what it executes
    started = [word.replace("ulimit -l 68719476736 && ", "") for word in command]
    started[-3:] = ["bash", "-c", "echo ready; kill -TERM $$; echo not reached"]
    done = subprocess.run(started, capture_output=True, text=True)
    assert (shell_code(done.returncode), done.stdout) == (143, "ready\n")
    assert command[-3:] == ["step-jax", "pretrain", "/etc/step-jax/recipe.yaml"]


# --- scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("slurm", "job.sh"), ("queued", "startup.sh")])
def test_scripts_are_bash_without_faults(tmp_path, name, file):
    text = target(name).place.render(job()).files[file]
    (tmp_path / file).write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / file)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", str(tmp_path / file)], check=True)


def test_a_start_up_script_leaves_the_recipe_and_the_environment_as_they_are(tmp_path):
    """Run with `docker` and the host's other commands replaced by ones that show their words."""
    script = target("queued").place.render(job()).files["startup.sh"]
    script = script.replace("/var/lib/step-jax", str(tmp_path / "home"))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("docker", "gcloud", "apt-get", "mount"):
        (tools / name).write_text(
            '#!/bin/bash\n[ "$1" = run ] && printf "%s\\n" "$QUOTED" "$@"\nexit 0\n'
        )
        (tools / name).chmod(0o755)
    script = script.replace("mkdir -p /shared", "true")
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={"PATH": f"{tools}:/usr/bin:/bin"},
    )
    words = done.stdout.splitlines()
    assert words[0] == "a b'$c", done.stderr
    assert (tmp_path / "home" / "recipe.yaml").read_text() == RECIPE
    assert words[words.index("--stop-timeout") + 1] == "210"
    assert words[-3:] == ["step-jax", "pretrain", str(tmp_path / "home" / "recipe.yaml")]


def test_queued_resources_are_asked_for_by_the_clouds_names():
    place = target("queued").place
    words = place.render(job()).submit
    assert words[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    for flag, value in {
        "--accelerator-type": "v6e-16",
        "--runtime-version": "v2-alpha-tpuv6e",
        "--node-id": "small",
    }.items():
        assert words[words.index(flag) + 1] == value
    assert "--spot" in words and "--reserved" not in words


@pytest.fixture
def slurm_tools(tmp_path) -> Path:
    """`srun` exits with what the file `code` says; `scontrol` fails as often as `busy` has lines,
    then notes what it is asked for; a script that is queued again is ended while it sleeps."""
    busy = f"[ -s {tmp_path}/busy ] && sed -i 1d {tmp_path}/busy && exit 1"
    for name, text in {
        "srun": f"exit $(cat {tmp_path}/code)",
        "scontrol": f'{busy}\necho "$@" >> {tmp_path}/asked',
        "sleep": "[ $1 = 60 ] && kill $PPID || true",
        "source": "true",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run_slurm(tools: Path, code: int, restarts: int) -> bool:
    """Whether the script asks to be queued again."""
    place = written(tools, "place: {kind: slurm, nodes: 2}").place
    (tools / "code").write_text(str(code))
    asked = tools / "asked"
    asked.unlink(missing_ok=True)
    script = place.script(job(folder=tools))
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    env["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert not asked.exists() or asked.read_text() == "requeue 7\n"
    assert done.returncode == (-15 if asked.exists() else code), done.stderr
    return asked.exists()


@pytest.mark.parametrize("code", sorted(EXITS))
def test_a_slurm_script_goes_by_the_table_of_exit_codes(slurm_tools, code):
    assert run_slurm(slurm_tools, code, 0) == (EXITS[code].again != "never")


def test_a_slurm_script_asks_a_busy_controller_again(slurm_tools):
    (slurm_tools / "busy").write_text("1\n2\n3\n")
    assert run_slurm(slurm_tools, 42, 0)


def test_a_slurm_script_gives_up_after_its_budget_of_failures_in_a_row(slurm_tools):
    again = [run_slurm(slurm_tools, 75, n) for n in range(5)]
    assert again == [True, True, True, False, False]
    assert run_slurm(slurm_tools, 42, 5)
    assert run_slurm(slurm_tools, 137, 6)  # a saved stop between them
    assert run_slurm(slurm_tools, 75, 0)  # a new job counts from nothing


# --- SkyPilot and this machine --------------------------------------------------------------------


def test_a_task_of_skypilot_has_its_fields():
    task = yaml.safe_load(target("skypilot").place.render(job()).files["task.yaml"])
    assert set(task) == {"name", "num_nodes", "resources", "envs", "file_mounts", "run"}
    assert task["num_nodes"] == 2
    # SkyPilot recovers from these codes without end, and from none else
    recovery = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [42]}
    assert task["resources"]["job_recovery"] == recovery
    assert "step_jax.launch.local 1 --restarts 3 --backoff 5 -- step-jax pretrain" in task["run"]
    run = task["run"].replace("exec python", "echo $JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID")
    env = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    env |= {"SKYPILOT_NODE_RANK": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-ec", run], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("10.0.0.1:8476 1 -m"), done.stderr


def test_the_local_place_starts_the_supervisor():
    rendered = target("local").place.render(job())
    assert rendered.foreground and "step_jax.launch.local" in rendered.submit
    assert rendered.submit[rendered.submit.index("step_jax.launch.local") + 1] == "2"


# --- target files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_every_example_is_short_and_loads(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert len(text.splitlines()) < 25
    assert target(name).place.processes >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("place: {kind: gk, image: x}", "unknown kind 'gk', expected one of: gke"),
        ("place: {kind: gke, topology: v5p:4x4x5, image: x}", "no TPU slice 'v5p:4x4x5'"),
        ("place: {kind: gke, topology: v5p:4x4x4}", "place.image: is required"),
        ("place: {kind: gke, topology: v5p:4x4x4, image: x, queu: y}", "did you mean 'queue'"),
        ("place: {kind: gke, topology: v5e:2x2, image: x, slices: 0}", "slices is 0"),
        ("place: {kind: queued-resources, topology: tpu7x:4x4x4, image: x, zone: y}", "kind gke"),
        ("place: {kind: slurm, nodes: 2, gpus_per_node: 8, processes_per_node: 3}", "not divide"),
        ("place: {kind: skypilot, accelerators: h100, image: x}", "a GPU and its number (H100:8)"),
        ("place: {kind: local}\nname: My_Run", "the name 'My_Run' must be of a-z"),
        ("place: {kind: local}\nrestarts: {budget: -1}", "budget is -1"),
        ("place: {kind: local}\nenvironment: {a-b: c}", "'a-b' is no name of a variable"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_target_file_is_said_with_its_place(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        written(tmp_path, text)
    assert message in str(error.value) and "target.yaml:" in str(error.value)


def test_every_slice_has_machines_for_its_chips():
    found = [slices.parse(f"{k}:{shape}") for k, (shapes, _) in TPUS.items() for shape in shapes]
    assert all(s.chips in (s.hosts * 4, s.hosts * s.chips) for s in found)
    hosts = {s.name: s.hosts for s in found}
    assert hosts["v5e:2x4"] == 1 and hosts["v5e:4x4"] == 4 and hosts["v5p:2x2x1"] == 1
    assert hosts["tpu7x:4x4x4"] == 16 and slices.parse("tpu7x:4x4x4").devices == 128
    assert slices.parse("v5p:8x8x16").accelerator == "v5p-2048"
    names = [s.accelerator for s in found if s.accelerator]
    assert len(names) == len(set(names))  # a cloud's name says which shape


def test_the_page_shows_the_table_of_exit_codes():
    page = (ROOT / "docs" / "pods.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \| (\w+) \|$", page, re.M)
    assert {int(code): (meaning, again) for code, meaning, again in rows} == {
        code: (end.meaning, end.again) for code, end in EXITS.items()
    }


def test_the_image_copies_what_is_there_and_installs_an_extra_that_is_there():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    copied = [n for line in re.findall(r"^COPY (.*)$", text, re.M) for n in line.split()[:-1]]
    let_through = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in let_through
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (
        re.search(r"^ARG EXTRA=(\w+)$", text, re.M)[1]
        in project["project"]["optional-dependencies"]
    )
    assert "ENTRYPOINT [" not in text


def test_names_are_made_of_recipes():
    assert name_of("configs/step2_1t.yaml") == "step2-1t"
    check_name(name_of("configs/" + "long_" * 20 + ".yaml"))


def test_the_grace_follows_the_longest_save_that_was_measured(tmp_path):
    assert longest_save(tmp_path) is None and longest_save("gs://bucket/run") is None
    said = "checkpoint: step {} saved, 5.0 MB in {} s, training waited 3.0 ms"
    notes = [
        {"event": "note", "step": n, "text": said.format(n, seconds)}
        for n, seconds in ((1, "12.50"), (2, "40.25"), (3, "7.00"))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(n) + "\n" for n in notes))
    assert longest_save(tmp_path) == 40.25
    assert grace_s(40.25) == 111


# --- submission -----------------------------------------------------------------------------------


def test_a_cluster_that_refuses_is_quoted_and_a_missing_tool_is_named():
    refusal = Rendered({}, ["bash", "-c", "echo 'queue unknown' >&2; exit 3"], "")
    with pytest.raises(StepError, match="bash refused the job:\nqueue unknown"):
        submit(refusal)
    with pytest.raises(ConfigError, match="no-kubectl is not installed here"):
        submit(Rendered({}, ["no-kubectl"], ""))
    assert submit(Rendered({}, ["echo", "job 7"], "")) == "job 7"
