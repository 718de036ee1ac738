# What both scripts share: a home for Flower that is thrown away, and processes that end with the script.
command -v flower-superlink >/dev/null || {
  echo "flower-superlink is not on the PATH: activate the environment that has mergesolve[flower]" >&2
  exit 2
}
export FLWR_HOME FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
app=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
FLWR_HOME=$(mktemp -d)
logs=$FLWR_HOME/logs
mkdir "$logs"
# Few images, so that a round takes seconds: what mergesolve federate calls --set.
small="training.images=64 server.images=0 server.reference=0 evaluation.images=100 evaluation.reference=1"
tasks=(digits chess clocks counts flags greek relations shapes textures)
groups=()
running='' # not empty as soon as there are logs that tell more than the script does

# Each process leads a group, so that what it starts ends with it.
launch() { # launch NAME COMMAND...
  local name=$1
  shift
  setsid "$@" >"$logs/$name.log" 2>&1 &
  groups+=($!)
  disown
}

finish() {
  local status=$?
  trap - EXIT INT TERM
  for group in "${groups[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done
  for _ in $(seq 50); do
    alive=0
    for group in "${groups[@]}"; do kill -0 -- "-$group" 2>/dev/null && alive=1; done
    [ "$alive" = 0 ] && break
    sleep 0.2
  done
  for group in "${groups[@]}"; do kill -KILL -- "-$group" 2>/dev/null || true; done
  if [ "$status" != 0 ] && [ -n "$running" ]; then
    for log in "$logs"/*.log; do
      echo "--- last lines of $(basename "$log")"
      tail -n 15 "$log"
    done
  fi
  rm -rf "$FLWR_HOME"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

wait_for_port() { # wait_for_port PORT: until something listens there
  for _ in $(seq 120); do
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return
    sleep 0.5
  done
  echo "nothing listens on 127.0.0.1:$1 after 60 s" >&2
  return 1
}
