#!/usr/bin/env bash
# Makes one virtual environment for each group of peers, in $ASSAY_PEERS (default: .peers/ in the
# repository's root). Peers that are there already are left alone. Needs Python 3.11 as python3.
#
# torch comes first and a constraints file holds it: several peers would otherwise pull a newer torch
# with its CUDA packages. (The name of the torch package on an index is the CPU or the CUDA build;
# set PIP_INDEX_URL or PIP_FIND_LINKS beforehand to choose another source.)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
peers=${ASSAY_PEERS:-$root/.peers}
mkdir -p "$peers"
echo '*' > "$peers/.gitignore"
constraints=$peers/constraints.txt
printf '%s\n' torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 accelerate==1.15.0 > "$constraints"

make() { # NAME PACKAGE...
  local home=$peers/$1
  shift
  if [ -e "$home/complete" ]; then
    echo "$home is there"
    return
  fi
  python3 -m venv --clear "$home"
  "$home/bin/pip" install --quiet --constraint "$constraints" torch==2.13.0
  "$home/bin/pip" install --quiet --constraint "$constraints" "$@"
  touch "$home/complete"
}

make llmc llmcompressor==0.14.0.1 transformers==5.17.0
make ar auto-round==0.16.1 transformers==5.23.0
make misc hqq==0.2.8.post1 optimum-quanto==0.2.7 transformers==5.23.0 accelerate
make kv kvpress==0.5.5
