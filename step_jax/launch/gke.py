"""TPU slices in Google Kubernetes Engine: a JobSet, queued by Kueue.

What a JobSet's fields mean: jobset.sigs.k8s.io, API jobset.x-k8s.io/v1alpha2. The rules act on exit
codes in two stages. A pod's failure ends its Job, for a reason: ``PodFailurePolicy``, with a
message that holds the condition or the exit code, or (codes that no rule names)
``BackoffLimitExceeded``. The JobSet then goes by reason and message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from step_jax.core.errors import ConfigError
from step_jax.launch import slices
from step_jax.launch.job import RECIPE, Job, Rendered, codes, to_yaml

_CONTAINER = "trainer"
_JOB = "slice"
_RECIPE_FOLDER = "/etc/step-jax"
_ANNOTATION = "step-jax/recipe"
# libtpu pins host memory, and an unprivileged container may pin next to none: GKE's pages on TPUs
# raise the limit so, which needs the capability below. `exec`: SIGTERM has to reach Python.
_START = ["bash", "-c", 'ulimit -l 68719476736 && exec "$@"', "start"]


@dataclass(frozen=True)
class Gke:
    """TPU slices in GKE.

    topology: of a slice, as `step-jax plan` names it: v5p:4x4x4.
    image: that holds step_jax (launch/Dockerfile).
    slices: joined by the data centre's network.
    queue: Kueue's LocalQueue; null submits without Kueue.
    priority: Kueue's WorkloadPriorityClass.
    namespace: of Kubernetes.
    context: of kubectl; null for the current one.
    service_account: of Kubernetes, for access to buckets.
    volumes: folder -> PersistentVolumeClaim mounted there.
    spot: nodes that may be taken away.
    host_network: the hosts' own network, faster between slices; the coordinator then listens on it.
    """

    kind: ClassVar[str] = "gke"
    platform: ClassVar[str] = "tpu"
    topology: str
    image: str
    slices: int = 1
    queue: str | None = None
    priority: str | None = None
    namespace: str = "default"
    context: str | None = None
    service_account: str | None = None
    volumes: dict[str, str] = field(default_factory=dict)
    spot: bool = False
    host_network: bool = False

    def validate(self) -> None:
        slices.parse(self.topology)
        slices.check_slices(self.slices)
        if self.priority and not self.queue:
            raise ConfigError("priority is Kueue's and needs queue")
        for folder in self.volumes:
            if not folder.startswith("/"):
                raise ConfigError(f"volumes: {folder!r} must be an absolute path")

    @property
    def processes(self) -> int:
        return self.slices * slices.parse(self.topology).hosts

    @property
    def devices(self) -> int:
        return self.slices * slices.parse(self.topology).devices

    def render(self, job: Job) -> Rendered:
        kubectl = ["kubectl"] + (["--context", self.context] if self.context else [])
        file = job.folder / "jobset.yaml"
        where = " ".join([*kubectl, "-n", self.namespace])
        return Rendered(
            {file.name: to_yaml(self.jobset(job))},
            [*kubectl, "create", "-f", str(file)],
            f"watch: {where} logs -f -l jobset.sigs.k8s.io/jobset-name={job.name} --prefix\n"
            f"end:   {where} delete jobset {job.name}   (SIGTERM: it saves, and goes on when it is "
            "launched again)",
        )

    def jobset(self, job: Job) -> dict[str, Any]:
        """The JobSet, as plain values."""
        labels = {"app.kubernetes.io/name": "step-jax"}
        if self.queue:
            labels["kueue.x-k8s.io/queue-name"] = self.queue
        if self.priority:
            labels["kueue.x-k8s.io/priority-class"] = self.priority
        hosts = slices.parse(self.topology).hosts
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": job.name,
                "namespace": self.namespace,
                "labels": labels,
                # A slice's node pool takes one Job at a time and the whole of it.
                "annotations": {
                    "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
                },
            },
            "spec": {
                "failurePolicy": _failure_policy(job.restarts.budget),
                "replicatedJobs": [
                    {
                        "name": _JOB,
                        "replicas": self.slices,
                        "template": {
                            "spec": {
                                "parallelism": hosts,
                                "completions": hosts,
                                "completionMode": "Indexed",
                                "backoffLimit": 0,
                                "podFailurePolicy": {"rules": _pod_rules()},
                                "template": {
                                    "metadata": {"annotations": {_ANNOTATION: job.recipe}},
                                    "spec": self._pod(job),
                                },
                            }
                        },
                    }
                ],
            },
        }

    def _pod(self, job: Job) -> dict[str, Any]:
        piece = slices.parse(self.topology)
        selector = {
            "cloud.google.com/gke-tpu-accelerator": piece.gke_label,
            "cloud.google.com/gke-tpu-topology": piece.shape,
        }
        if self.spot:
            selector["cloud.google.com/gke-spot"] = "true"
        recipe = {
            "path": RECIPE,
            "fieldRef": {"fieldPath": f"metadata.annotations['{_ANNOTATION}']"},
        }
        mounts = [
            {"name": "recipe", "mountPath": _RECIPE_FOLDER, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ]
        volumes: list[dict[str, Any]] = [
            {"name": "recipe", "downwardAPI": {"items": [recipe]}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ]
        for number, (folder, claim) in enumerate(self.volumes.items()):
            mounts.append({"name": f"volume-{number}", "mountPath": folder})
            source = {"persistentVolumeClaim": {"claimName": claim}}
            volumes.append({"name": f"volume-{number}", **source})
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": job.grace_s,
            "nodeSelector": selector,
            "tolerations": [
                {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}
            ],
            "containers": [
                {
                    "name": _CONTAINER,
                    "image": self.image,
                    "command": [*_START, *job.words(f"{_RECIPE_FOLDER}/{RECIPE}")],
                    "env": [{"name": k, "value": v} for k, v in job.environment.items()],
                    "resources": {"limits": {"google.com/tpu": piece.chips // piece.hosts}},
                    "securityContext": {
                        "privileged": False,
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"], "add": ["SYS_RESOURCE"]},
                    },
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        }
        if self.service_account:
            pod["serviceAccountName"] = self.service_account
        if self.host_network:
            pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
        return pod


def _pod_rules() -> list[dict[str, Any]]:
    def of(operator: str, values: list[int]) -> dict[str, Any]:
        return {"containerName": _CONTAINER, "operator": operator, "values": values}

    return [
        # Maintenance, preemption, eviction, a node that is gone.
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": of("In", codes("free"))},
        {
            "action": "FailJob",
            "onExitCodes": of("NotIn", sorted(codes("free") + codes("counted"))),
        },
    ]


def _failure_policy(budget: int) -> dict[str, Any]:
    """What no rule matches (hangs, lost processes) restarts the JobSet ``budget`` times at most."""
    by_policy = {"onJobFailureReasons": ["PodFailurePolicy"]}
    saved = [f"failed with exit code {code} matching" for code in codes("free")]
    free = "RestartJobSetAndIgnoreMaxRestarts"
    return {
        "maxRestarts": budget,
        "rules": [
            {"name": "disrupted", "action": free, **by_policy,
             "onJobFailureMessagePatterns": ["has condition DisruptionTarget matching"]},
            {"name": "saved", "action": free, **by_policy, "onJobFailureMessagePatterns": saved},
            {"name": "hopeless", "action": "FailJobSet", **by_policy},
        ],
    }  # fmt: skip
