#!/usr/bin/env bash
# A federation on the zoo, simulated: a SuperLink on this machine, clients as Ray actors, and a table at the end.
#   bash simulation.sh [--clients N (1 to 9)] [--rounds N] [--port PORT] [--folder FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
clients=3 rounds=2 port='' folder=$FLWR_HOME/federation
while [ $# -gt 0 ]; do
  case $1 in
    --clients) clients=$2 ;;
    --rounds) rounds=$2 ;;
    --port) port=$2 ;;
    --folder) folder=$(realpath -m "$2") ;;
    *) echo "unknown option $1; see the head of this script" >&2; exit 2 ;;
  esac
  shift 2
done
port=${port:-$(free_port)}

cat >"$FLWR_HOME/config.toml" <<EOF
[superlink]
default = "lab"

[superlink.lab]
address = "127.0.0.1:$port"
insecure = true
EOF

launch superlink flower-superlink --insecure --simulation --isolation subprocess \
  --host 127.0.0.1 --port "$port" --disable-runtime-dependency-installation
wait_for_port "$port"
running=1
# The exit status of flwr run says nothing about the run: the last line asks for it.
flwr run "$app" lab --stream --federation-config "num-supernodes=$clients" \
  --run-config "clients='${tasks[*]:0:clients}' rounds=$rounds set='$small' folder='$folder'"
python -m mergesolve.federated.flower.status lab
