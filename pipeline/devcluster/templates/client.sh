#!/bin/sh
# $client of a devcluster: called on the machine itself, it runs on the login host; called on a host, it runs there.
export SLURM_CONF=$conf
if [ "$$(readlink /proc/self/ns/net)" = "$machine" ]; then
    case "$client $$PWD/" in
    "sbatch /tmp/"* | "srun /tmp/"* | "salloc /tmp/"*)
        echo "$$PWD: is below /tmp, which each node has for itself; work in a folder elsewhere, such as /var/tmp" >&2
        exit 1
        ;;
    esac
    exec nsenter --target $login_pid $namespaces -- env --chdir="$$PWD" $program "$$@"
fi
exec $program "$$@"
