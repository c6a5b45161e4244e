#!/usr/bin/env bash
# Installs Debian's packages for `pipeline devcluster` and starts none of their services. Safe to run again.
set -euo pipefail

packages=(slurm-wlm slurmdbd munge mariadb-server iproute2 util-linux)

[ "$(id -u)" = 0 ] || { echo "install.sh: needs root" >&2; exit 2; }
missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

# While this policy stands, the packages cannot start the machine's own munged, slurmctld and MariaDB.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
