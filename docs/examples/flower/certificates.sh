#!/usr/bin/env bash
# A certificate authority and a certificate for a SuperLink on this machine, for trying TLS out.
#   bash certificates.sh FOLDER
set -euo pipefail
folder=${1:?usage: certificates.sh FOLDER}
mkdir -p "$folder"
cd "$folder"
openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj "/CN=mergesolve test CA" \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
  -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey rsa:2048 -nodes -subj "/CN=localhost" -keyout server.key -out server.csr 2>/dev/null
# Clients look for the address that they connect to among the alternative names; the common name does not count.
cat >server.ext <<EOF
basicConstraints=CA:FALSE
keyUsage=critical,digitalSignature,keyEncipherment
extendedKeyUsage=serverAuth
subjectAltName=DNS:localhost,IP:127.0.0.1
EOF
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 \
  -extfile server.ext -out server.crt 2>/dev/null
rm server.csr server.ext
chmod 600 ca.key server.key
openssl verify -CAfile ca.crt server.crt
