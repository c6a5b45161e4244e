#!/bin/sh
# $client of a devcluster: called on the machine itself, it runs on the login host; called on a host, it runs there.
export SLURM_CONF=$conf
if [ "$$(readlink /proc/self/ns/net)" = "$machine" ]; then
    exec nsenter --target $login_pid $namespaces -- env --chdir="$$PWD" $program "$$@"
fi
exec $program "$$@"
