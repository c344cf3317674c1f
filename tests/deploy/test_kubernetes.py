"""The Kubernetes manifests are valid and hardened, leave time to drain, and run the right commands."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest

from deploy.manifests import KUBERNETES, SETTINGS, documents, kubernetes, procfile, pyproject

VERSIONS = ("1.30", kubernetes_validate.latest_version())
OBJECTS = {f"{document['kind']}/{document['metadata']['name']}": document for _, document in kubernetes()}
PODS = {
    name.split("followups-")[-1]: document["spec"]["template"]["spec"]
    for name, document in OBJECTS.items()
    if document["kind"] in {"Deployment", "Job"}
}
PROCESSES = {"web": "web", "worker": "worker", "beat": "beat", "migrate": "release"}


def container(name: str) -> Any:
    """Return the only container of a pod."""
    (one,) = PODS[name]["containers"]
    return one


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OBJECTS)
def test_the_objects_are_valid(name: str, version: str) -> None:
    """Each object is valid in the oldest supported and the newest known version of Kubernetes."""
    kubernetes_validate.validate(OBJECTS[name], version, strict=True)


def test_kubectl_accepts_the_manifests() -> None:
    """All manifests together are accepted by kubectl.

    This test runs only if kubectl is installed, and needs no cluster.
    """
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("kubectl is not installed")
    ran = subprocess.run([kubectl, "kustomize", KUBERNETES], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert f"image: chat-followups:{pyproject()['project']['version']}" in ran.stdout


def test_kustomize_names_every_file() -> None:
    """The kustomization lists every file except the migration and the adapter's rule."""
    (kustomization,) = documents(KUBERNETES / "kustomization.yaml")
    others = {"kustomization.yaml", "migrate.yaml", "prometheus-adapter.yaml"}
    assert set(kustomization["resources"]) == {path.name for path in KUBERNETES.glob("*.yaml")} - others
    version = pyproject()["project"]["version"]
    assert [image["newTag"] for image in kustomization["images"]] == [version]
    assert container("migrate")["image"].endswith(f":{version}")


@pytest.mark.parametrize("name", PROCESSES)
def test_each_container_runs_the_procfiles_command(name: str) -> None:
    """Each container runs exactly the Procfile's command."""
    assert container(name)["command"] == procfile(PROCESSES[name])


@pytest.mark.parametrize("name", PODS)
def test_containers_have_few_privileges(name: str) -> None:
    """Containers run read-only, with limited memory, and without root, capabilities or a cluster token."""
    pod, context = PODS[name], container(name)["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert container(name)["resources"]["limits"]["memory"]
    assert container(name)["resources"]["requests"]["cpu"]


@pytest.mark.parametrize(("name", "seconds"), [("web", 5 + 20), ("worker", 10 + 20), ("beat", 10)])
def test_a_pod_has_time_to_drain(name: str, seconds: int) -> None:
    """A pod's grace period is long enough for the process to finish its work in progress."""
    assert PODS[name]["terminationGracePeriodSeconds"] >= seconds


@pytest.mark.parametrize("name", ["web", "worker", "beat"])
def test_pods_have_probes_and_are_spread(name: str) -> None:
    """Pods have startup and liveness probes, are spread over machines, and survive a node drain."""
    assert container(name)["startupProbe"]
    assert container(name)["livenessProbe"]
    assert PODS[name]["topologySpreadConstraints"]
    labels = OBJECTS[f"Deployment/followups-{name}"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS[f"PodDisruptionBudget/followups-{name}"]["spec"]["selector"]["matchLabels"] == labels
    assert PODS[name]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == labels
    assert OBJECTS[f"Deployment/followups-{name}"]["spec"]["selector"]["matchLabels"] == labels


def test_readiness_does_not_depend_on_shared_servers() -> None:
    """If a shared server fails, the `web` pods do not all become unready at once."""
    assert container("web")["readinessProbe"]["httpGet"]["path"] == "/healthz"


def test_two_beats() -> None:
    """Two beat pods are configured, so that ticks continue if one is missing."""
    assert OBJECTS["Deployment/followups-beat"]["spec"]["replicas"] == 2


def test_workers_are_scaled_by_overdue_follow_ups() -> None:
    """Only the autoscaler sets the number of workers, using the adapter's metric."""
    autoscaler = OBJECTS["HorizontalPodAutoscaler/followups-worker"]["spec"]
    (metric,) = autoscaler["metrics"]
    name = metric["external"]["metric"]["name"]
    assert autoscaler["scaleTargetRef"]["name"] == "followups-worker"
    assert "replicas" not in OBJECTS["Deployment/followups-worker"]["spec"]
    assert f"max({name}{{" in OBJECTS["ConfigMap/followups-external-metrics"]["data"]["config.yaml"]


def test_the_window_is_wide_enough_for_the_most_workers() -> None:
    """If the autoscaler runs its maximum number of workers, MAX_IN_FLIGHT covers all their slots."""
    most = OBJECTS["HorizontalPodAutoscaler/followups-worker"]["spec"]["maxReplicas"]
    assert int(OBJECTS["ConfigMap/followups"]["data"]["FOLLOWUPS_MAX_IN_FLIGHT"]) >= 2 * 100 * most


def test_every_setting_is_known() -> None:
    """The ConfigMap contains only existing settings, and no file contains a secret."""
    assert OBJECTS["ConfigMap/followups"]["data"].keys() <= SETTINGS
    assert not [name for name in OBJECTS if name.startswith("Secret/")]
