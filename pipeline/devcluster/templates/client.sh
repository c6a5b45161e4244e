#!/bin/sh
# $client of a devcluster: run on its login host when called from the machine itself, as it is on its own hosts.
export SLURM_CONF=$conf
if [ "$$(readlink /proc/self/ns/net)" = "$machine" ]; then
    exec nsenter --target $login_pid $namespaces -- env --chdir="$$PWD" $program "$$@"
fi
exec $program "$$@"
