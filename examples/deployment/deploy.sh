#!/usr/bin/env bash
# A SuperLink and its SuperNodes with TLS and node authentication; docs/deployment.md explains.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: deploy.sh COMMAND

  certificates HOST...   CA and server certificate of the SuperLink, for these names and addresses
  key I                  key pair of SuperNode I
  connection NAME        let `flwr run APP NAME` find the SuperLink
  register FILE.pub...   allow the SuperNodes with these public keys
  start SERVICE...       start in the background and wait until it works
  exec SERVICE           run in the foreground (systemd, containers)
  status                 what runs, by pid
  stop [SERVICE...]      stop these services with all their children; all services by default
  flwr ARGUMENT...       flwr with this deployment's connections

SERVICE is superlink or supernode-I, with I the partition: 0 to NUM_PARTITIONS - 1.

Settings (environment):
  DEPLOYMENT       folder of certificates, keys, logs and state  (./deployment)
  SUPERLINK        HOST:PORT of the SuperLink                    (127.0.0.1:9092)
  LISTEN           address that the SuperLink listens on         (that of SUPERLINK)
  NUM_PARTITIONS   SuperNodes in the federation                  (needed by supernode-I)
  NODE_CONFIG      further key=value pairs of a SuperNode        ()
  CPUS             CPUs of a service, as taskset counts them     (all)
  GPU              GPU of a SuperNode; none: no GPU              (I modulo the GPUs here)
  RUNTIME_PORT     local port of SuperNode 0; I is added         (19094)
  START_TIMEOUT    seconds that `start` waits                    (90)
  BIN              folder of flwr's programs                     (.venv/bin of this checkout)
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 1
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${DEPLOYMENT:=deployment}"
DEPLOYMENT=$(cd "$DEPLOYMENT" && pwd)
: "${SUPERLINK:=127.0.0.1:9092}" "${RUNTIME_PORT:=19094}" "${START_TIMEOUT:=90}"
: "${BIN:=$here/../../.venv/bin}"
[ -x "$BIN/flwr" ] || fail "BIN is '$BIN'; allowed: the folder that holds flwr (make install)"
BIN=$(cd "$BIN" && pwd)
export PATH="$BIN:$PATH" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
certificates=$DEPLOYMENT/certificates keys=$DEPLOYMENT/keys
umask 077

# ------------------------------------------------------------------- certificates and keys

make_certificates() {
  [ $# -gt 0 ] || fail "certificates needs the names and addresses of the SuperLink's machine"
  mkdir -p "$certificates"
  [ ! -e "$certificates/ca.key" ] || fail "$certificates/ca.key exists: remove it to start anew"
  local host names=",DNS:localhost,IP:127.0.0.1"
  for host in "$@"; do
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then
      names+=",IP:$host"
    else
      names+=",DNS:$host"
    fi
  done
  local curve=(-newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes)
  openssl req -x509 "${curve[@]}" -days 3650 -subj "/CN=fl-bgmd deployment CA" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
    -keyout "$certificates/ca.key" -out "$certificates/ca.crt" 2>/dev/null
  openssl req "${curve[@]}" -subj "/CN=$1" -keyout "$certificates/server.key" \
    -out "$certificates/server.csr" 2>/dev/null
  printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "${names#,}" >"$certificates/server.ext"
  openssl x509 -req -days 825 -in "$certificates/server.csr" -CA "$certificates/ca.crt" \
    -CAkey "$certificates/ca.key" -CAcreateserial -extfile "$certificates/server.ext" \
    -out "$certificates/server.pem" 2>/dev/null
  rm "$certificates/server.csr" "$certificates/server.ext"
  echo "copy to every machine: $certificates/ca.crt; keep the rest here"
}

make_key() {
  [[ ${1:-} =~ ^[0-9]+$ ]] || fail "key is '${1:-}'; allowed: the number of a SuperNode"
  mkdir -p "$keys"
  [ ! -e "$keys/supernode-$1" ] || fail "$keys/supernode-$1 exists: remove it to start anew"
  ssh-keygen -q -t ecdsa -b 384 -N "" -C "supernode-$1" -f "$keys/supernode-$1"
  echo "$keys/supernode-$1.pub"
}

# ------------------------------------------------------------------------- Flower's commands

home_of() { echo "$DEPLOYMENT/flwr/$1"; }

operator() { FLWR_HOME=$(home_of operator) flwr "$@"; }

add_connection() {
  [[ ${1:-} =~ ^[A-Za-z0-9_-]+$ ]] || fail "connection is '${1:-}'; allowed: a name"
  mkdir -p "$(home_of operator)"
  printf '[superlink]\ndefault = "%s"\n\n[superlink.%s]\naddress = "%s"\nroot-certificates = "%s"\n' \
    "$1" "$1" "$SUPERLINK" "$certificates/ca.crt" >"$(home_of operator)/config.toml"
  echo "export FLWR_HOME=$(home_of operator)   # then: flwr run . $1"
}

register() {
  local file
  [ $# -gt 0 ] || fail "register needs public keys"
  for file in "$@"; do
    operator supernode register "$file" --name "$(basename "$file" .pub)"
  done
}

# Fills `command` with what runs a service.
prepare() {
  local service=$1
  command=(env "FLWR_HOME=$(home_of "$service")")
  if [ "$service" = superlink ]; then
    pin_cpus
    command+=(flower-superlink
      --ssl-ca-certfile "$certificates/ca.crt" --ssl-certfile "$certificates/server.pem"
      --ssl-keyfile "$certificates/server.key" --enable-supernode-auth
      --host "${LISTEN:-${SUPERLINK%:*}}" --port "${SUPERLINK##*:}" --database "$DEPLOYMENT/state.db"
      --disable-runtime-dependency-installation)
  elif [[ $service =~ ^supernode-([0-9]+)$ ]]; then
    local index=${BASH_REMATCH[1]}
    [[ ${NUM_PARTITIONS:-} =~ ^[0-9]+$ ]] && [ "$index" -lt "$NUM_PARTITIONS" ] ||
      fail "service is $service, NUM_PARTITIONS is '${NUM_PARTITIONS:-}'; allowed: I below it"
    choose_gpu "$index"
    pin_cpus
    command+=(flower-supernode --root-certificates "$certificates/ca.crt"
      --auth-supernode-private-key "$keys/$service"
      --superlink "$SUPERLINK" --port $((RUNTIME_PORT + index))
      --node-config "partition-id=$index num-partitions=$NUM_PARTITIONS ${NODE_CONFIG:-}")
  else
    fail "service is '$service'; allowed: superlink, supernode-I"
  fi
  mkdir -p "$(home_of "$service")" "$DEPLOYMENT/work" "$DEPLOYMENT/log" "$DEPLOYMENT/run"
}

pin_cpus() { [ -z "${CPUS:-}" ] || command+=(taskset --cpu-list "$CPUS"); }

choose_gpu() {
  local count=0
  ! command -v nvidia-smi >/dev/null || count=$(nvidia-smi --list-gpus | grep -c '^GPU' || true)
  if [ "${GPU:-}" = none ]; then
    command+=(CUDA_VISIBLE_DEVICES=)
  elif [ -n "${GPU:-}" ]; then
    command+=("CUDA_VISIBLE_DEVICES=$GPU")
  elif [ "$count" -gt 0 ]; then
    command+=("CUDA_VISIBLE_DEVICES=$(($1 % count))")
  fi
}

# ------------------------------------------------------------------------------- processes

# Pids of a service and of all its descendants, orphans included: they inherit its FLWR_HOME.
pids_of() {
  local environment
  for environment in /proc/[0-9]*/environ; do
    if grep -qzxF "FLWR_HOME=$(home_of "$1")" "$environment" 2>/dev/null; then
      environment=${environment#/proc/}
      echo "${environment%/environ}"
    fi
  done
}

# Starts `command`; returns once its log says that it works, fails when it ends or takes too long.
# Leaves the length that the log had before in `lines`.
launch() {
  local service=$1 log=$2 deadline=$3 sign="SuperNode ID" pid
  [ "$service" != superlink ] || sign="Uvicorn running"
  lines=$(wc -l <"$log")
  (cd "$DEPLOYMENT/work" && exec setsid "${command[@]}") >>"$log" 2>&1 </dev/null &
  pid=$!
  echo "$pid" >"$DEPLOYMENT/run/$service.pid"
  while kill -0 "$pid" 2>/dev/null && [ $SECONDS -lt "$deadline" ]; do
    sleep 0.5
    if tail -n "+$((lines + 1))" "$log" | grep "$sign" >/dev/null; then
      echo "$service: pid $pid, log $log"
      return 0
    fi
  done
  stop "$service" >/dev/null
  return 1
}

# A SuperNode that was killed is refused until the SuperLink misses its heartbeats, for a minute;
# the refusal does not tell it from one that is not registered.
start() {
  local service=$1 deadline=$((SECONDS + START_TIMEOUT)) log=$DEPLOYMENT/log/$1.log pids lines=0
  pids=$(pids_of "$service" | xargs)
  [ -z "$pids" ] || fail "$service runs already: $pids"
  prepare "$service"
  echo "--- $(date -u +%FT%TZ) start $service" >>"$log"
  until launch "$service" "$log" "$deadline"; do
    if [ $SECONDS -ge $deadline ] ||
      ! tail -n "+$((lines + 1))" "$log" | grep "Failed to activate SuperNode" >/dev/null; then
      tail -n "+$((lines + 1))" "$log" | tail -n 40 >&2
      fail "$service did not start; log: $log"
    fi
    echo "$service: refused: not registered, or still taken for alive; trying again" >&2
    sleep 5
  done
}

# The service itself is asked first; then what it left, which would take its time to notice.
stop() {
  local service=$1 pid pids left waited=0
  pids=$(pids_of "$service" | xargs)
  [ -n "$pids" ] || return 0
  pid=$(cat "$DEPLOYMENT/run/$service.pid" 2>/dev/null || true)
  [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true
  while left=$(pids_of "$service" | xargs) && [ -n "$left" ]; do
    if [ $waited -ge 40 ]; then
      kill -KILL $left 2>/dev/null || true
    elif [[ " $left " != *" $pid "* ]]; then
      kill -TERM $left 2>/dev/null || true
    fi
    sleep 0.5
    waited=$((waited + 1))
  done
  rm -f "$DEPLOYMENT/run/$service.pid"
  echo "$service: stopped ($pids)"
}

services() {
  local home
  for home in "$DEPLOYMENT"/flwr/supernode-* "$DEPLOYMENT"/flwr/superlink; do
    [ ! -d "$home" ] || basename "$home"
  done
}

status() {
  local service pids
  for service in $(services); do
    pids=$(pids_of "$service" | xargs)
    echo "$service: ${pids:-stopped}"
  done
}

verb=${1:-help} all=()
[ $# -eq 0 ] || shift
case $verb in
  certificates) make_certificates "$@" ;;
  key) make_key "$@" ;;
  connection) add_connection "$@" ;;
  register) register "$@" ;;
  start) for service in "$@"; do start "$service"; done ;;
  exec)
    prepare "${1:-}"
    cd "$DEPLOYMENT/work"
    exec "${command[@]}"
    ;;
  status) status ;;
  stop)
    [ $# -gt 0 ] || mapfile -t all < <(services)
    for service in "$@" "${all[@]}"; do stop "$service"; done
    ;;
  flwr) operator "$@" ;;
  help | --help | -h) usage ;;
  *) usage >&2; exit 2 ;;
esac
