#!/usr/bin/env bash
# A federation of two SuperNodes with TLS on this machine: certificates, SuperLink, SuperNodes, run, check.
#   bash deployment.sh [--rounds N] [--port PORT] [--folder FOLDER] [--kill-one | --resume | --wrong-ca]
# --kill-one: end one SuperNode in the middle of round 2. --resume: end the SuperLink in the middle of round 2, start it
# again and go on. --wrong-ca: give the second SuperNode the certificate of another authority, which must be told.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
rounds=2 port='' folder=$FLWR_HOME/federation mode=plain clients=2
while [ $# -gt 0 ]; do
  case $1 in
    --rounds) rounds=$2 && shift ;;
    --port) port=$2 && shift ;;
    --folder) folder=$(realpath -m "$2") && shift ;;
    --kill-one | --resume | --wrong-ca) mode=${1#--} ;;
    *) echo "unknown option $1; see the head of this script" >&2; exit 2 ;;
  esac
  shift
done
port=${port:-$(free_port)}
keys=$FLWR_HOME/keys
bash "$app/certificates.sh" "$keys"
if [ "$mode" = wrong-ca ]; then bash "$app/certificates.sh" "$FLWR_HOME/stranger"; fi
python -m mergesolve.federated.flower.certificates --certificate "$keys/server.crt" --key "$keys/server.key"

cat >"$FLWR_HOME/config.toml" <<EOF
[superlink]
default = "lab"

[superlink.lab]
address = "127.0.0.1:$port"
root-certificates = "$keys/ca.crt"
EOF

# Without --database, a SuperLink that is started again does not know its SuperNodes, and they do not register again.
superlink() {
  launch "$1" flower-superlink --host 127.0.0.1 --port "$port" --isolation subprocess \
    --database "$FLWR_HOME/superlink.db" --ssl-ca-certfile "$keys/ca.crt" --ssl-certfile "$keys/server.crt" --ssl-keyfile "$keys/server.key" \
    --disable-runtime-dependency-installation
  server=${groups[-1]}
  wait_for_port "$port"
}

supernode() { # supernode NUMBER CA
  python -m mergesolve.federated.flower.certificates "127.0.0.1:$port" --ca "$2"
  launch "supernode-$1" flower-supernode --superlink "127.0.0.1:$port" --root-certificates "$2" \
    --host 127.0.0.1 --port "$(free_port)" --node-config "partition-id=$1 num-partitions=$clients"
  node=${groups[-1]}
}

run() { # run NAME: the log is followed here; the exit status of flwr run says nothing about the run
  running=1
  flwr run "$app" lab --stream \
    --run-config "clients='${tasks[*]:0:clients}' rounds=$rounds set='$small' folder='$folder'" 2>&1 | tee "$logs/$1.log"
}

wait_for() { # wait_for FILE TEXT
  for _ in $(seq 600); do
    grep -q -F "$2" "$1" 2>/dev/null && return
    sleep 0.5
  done
  echo "'$2' did not appear in $(basename "$1") within 300 s" >&2
  return 1
}

superlink superlink
supernode 0 "$keys/ca.crt"
if [ "$mode" = wrong-ca ]; then supernode 1 "$FLWR_HOME/stranger/ca.crt"; else supernode 1 "$keys/ca.crt"; fi

# Only the logs tell when a round is under way: the server has sent its model, and a SuperNode is at work on it.
amid_round_2() { # amid_round_2 RUN
  wait_for "$logs/$1.log" "round 2: 2 of 2 clients train"
  wait_for "$logs/supernode-1.log" "ROUND 2]"
}

case $mode in
  plain) run run ;;
  kill-one)
    run run &
    following=$!
    amid_round_2 run
    kill -KILL -- "-$node"
    echo "### SuperNode 1 was killed in the middle of round 2"
    wait "$following"
    ;;
  resume)
    run before &
    following=$!
    amid_round_2 before
    kill -KILL -- "-$server"
    echo "### the SuperLink was killed in the middle of round 2, and its ServerApp with it"
    wait "$following" || true
    superlink superlink-again
    run again
    ;;
esac
python -m mergesolve.federated.flower.status lab
