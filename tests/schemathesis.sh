#!/usr/bin/env bash
# Holds the OpenAPI document against the running product (schemathesis): no server error, no answer, media type or body that the document
# does not name. First with made-up ids, then with those of things that are there, last what ends tokens and agents.
# Usage: tests/schemathesis.sh [EXAMPLES]     examples for each operation, default 15; the seed is printed, HYPERSDK_SEED repeats a run
set -euo pipefail
cd "$(dirname "$0")/.."
EXAMPLES=${1:-15}
SEED=${HYPERSDK_SEED:-$RANDOM}
TARGET=$(cd "${CARGO_TARGET_DIR:-target}" && pwd)
venv=$TARGET/schemathesis
wanted="schemathesis==4.32.5"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$wanted"
    printf '%s' "$wanted" >"$venv/installed"
fi

work=$(mktemp -d)
server=
trap '[ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server" || true; }; rm -rf "$work"' EXIT
mkdir "$work/vms"
head -c 2M /dev/urandom >"$work/vms/web-server-01.raw"
password=$(head -c 18 /dev/urandom | base64)
export HYPERSDK_ADMIN_PASSWORD=$password HYPERSDK_BCRYPT_COST=10 HYPERSDK_LIMITS_ANONYMOUS_BURST=1000000 HYPERSDK_LIMITS_ANONYMOUS_REPLENISH_MS=1 \
    HYPERSDK_LIMITS_USER_PER_MINUTE=100000000 HYPERSDK_LIMITS_LOGIN_FREE_TRIES=1000000 HYPERSDK_LIMITS_LOGIN_FREE_TRIES_ADDRESS=1000000
"$TARGET/debug/hypersdk" up --listen 127.0.0.1:0 --data-dir "$work/data" --vms "$work/vms" >"$work/log" 2>&1 &
server=$!

# Everything else of the set-up, and the file that gives schemathesis the ids of things that are there.
python3 - "$work" "$password" >"$work/facts" <<'PY'
import hashlib, json, pathlib, ssl, sys, time, urllib.error, urllib.request
work, password = pathlib.Path(sys.argv[1]), sys.argv[2]
context = ssl._create_unverified_context()
def call(method, path, body=None, token=None, kind="application/json"):
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": kind} if data is not None else {}
    if token: headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"{base}/api/v1{path}", data, headers, method=method)
    with urllib.request.urlopen(request, context=context) as answer:
        text = answer.read()
        return json.loads(text) if text else None
def until(what, look):
    end = time.monotonic() + 60
    while True:
        try:
            found = look()
            if found: return found
            last = "not yet"
        except (OSError, ValueError, KeyError) as e:
            last = repr(e)
        if time.monotonic() > end: sys.exit(f"{what}: {last}\n{(work / 'log').read_text()[-3000:]}")
        time.sleep(0.1)
base = until("endpoints.json", lambda: json.loads((work / "data/controller/endpoints.json").read_text())["rest"])
login = lambda name, secret: call("POST", "/auth/login", {"username": name, "password": secret})["token"]
token = until("a log-in", lambda: login("admin", password))
until("the agent", lambda: call("GET", "/agents?status=connected", token=token)["data"])
until("the VM", lambda: call("GET", "/vms/list?refresh=true", token=token)["data"])
# Its token is the one the fuzzer uses: another account, so that nothing it does to `admin` or `alice` ends it.
call("POST", "/users", {"username": "examiner", "password": "quite long enough", "role": "admin"}, token)
examiner = login("examiner", "quite long enough")
job = lambda: call("POST", "/jobs", {"type": "export", "provider": "local", "vm_name": "web-server-01", "format": "qcow2"}, token)["id"]
def ended(id):
    until(id, lambda: call("GET", f"/jobs/{id}", token=token)["status"] == "completed")
    return id
paths = {"/jobs/": ended(job()), "/exports/": ended(job()), "/agents/": call("GET", "/agents", token=token)["data"][0]["id"], "/providers/": "local"}
document = call("GET", "/openapi.json", token=token)["paths"]
body = b"hypersdk" * 512
if "/upload/init" in document:
    upload = call("POST", "/upload/init", {"filename": "disk.raw", "size": len(body)}, token)["upload_id"]
    call("POST", f"/upload/chunk?upload_id={upload}&index=0", body, token, "application/octet-stream")
    paths["/upload/"] = upload
if "/schedules" in document:
    schedule = {"name": "nightly", "cron": "0 3 * * *", "job": {"type": "export", "provider": "local", "vm_name": "web-server-01", "format": "qcow2"}}
    paths["/schedules/"] = call("POST", "/schedules", schedule, token)["id"]
if "/auth/tokens" in document:
    paths["/auth/tokens/"] = call("POST", "/auth/tokens", {"name": "spare"}, token)["id"]
# 502 and 503 say, where they are documented, that somebody else did not answer; the answer that nobody documents stays a failure.
checks = 'not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "502", "503"]'
toml = [f"[checks]\n{checks}\n"]
for path, item in sorted(document.items()):
    known = next((paths[start] for start in sorted(paths, reverse=True) if path.startswith(start) and "{" in path), None)
    if path == "/vms/{provider}/{id}": settings = {"provider": "local", "id": "web-server-01"}
    elif known: settings = {path[path.index("{") + 1:path.index("}")]: known}
    else: continue
    values = ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in settings.items())
    toml.append(f"[[operations]]\ninclude-path = {json.dumps(path)}\nparameters = {{ {values} }}\n")
(work / "there.toml").write_text("\n".join(toml))
(work / "none.toml").write_text(toml[0])
print(base); print(examiner)
PY
mapfile -t facts <"$work/facts"

# examine CONFIG MORE…
examine() {
    local config=$1
    shift
    "$venv/bin/schemathesis" --config-file "$work/$config.toml" run "${facts[0]}/api/v1/openapi.json" --url "${facts[0]}/api/v1" --tls-verify false \
        -H "Authorization: Bearer ${facts[1]}" --seed "$SEED" --warnings off --request-timeout 60 --continue-on-failure --no-color \
        --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,allow_header_conformance \
        --max-examples "$EXAMPLES" --exclude-path /ws --exclude-path '/vms/{provider}/{id}/console' "$@"
}
# What ends the token or the agent that the others need.
ENDS='^(/auth/logout|/auth/refresh|/users/\{name\}|/agents/\{id\}.*)$'
failed=0
echo "seed $SEED"
examine none --phases examples,coverage,fuzzing --exclude-path-regex "$ENDS" || failed=1
examine there --phases examples,coverage --include-path-regex '\{' --exclude-path-regex "$ENDS" || failed=1
examine there --phases examples,coverage --include-path-regex "$ENDS" || failed=1
if grep -qE 'panicked|request failed by our defect' "$work/log"; then
    grep -E 'panicked|request failed by our defect' "$work/log" | head -20
    failed=1
fi
kill -0 "$server" || { echo "the server is gone"; tail -n 30 "$work/log"; failed=1; }
exit $failed
