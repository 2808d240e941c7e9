#!/usr/bin/env bash
# The MLflow server of a cluster's head, with its database: `mlflow_server.sh start|stop|status`.
#
# `start` may be called again and again (every `ray up` does): what runs with the same settings is left alone, what is
# dead is started, what runs with other settings is started anew. The server listens on loopback only; it comes back by
# itself when its process dies. `python` is the one on PATH; it needs mlflow, and psycopg2 for PostgreSQL.
#
#   COPERNICUS_DATABASE      postgresql (the default): a PostgreSQL of its own, on this host's disk. It is reached by a
#                            Unix socket that only this user can open, so it has no password and no port.
#                            sqlite: a file in the folder below.
#                            /path/of/a/file: the file holds the URI of a managed database; mode 600.
#                            scheme://...: that URI. Never write one with a password into a cluster's YAML.
#   COPERNICUS_ARTIFACTS     where the server keeps artifacts: s3://bucket/prefix, gs://bucket/prefix, or a folder (the
#                            default, in the folder below). Clients send them through the server and need no access.
#   COPERNICUS_MLFLOW_HOME   folder of the database, the logs and the marks of what runs (~/copernicus-mlflow).
#   COPERNICUS_MLFLOW_PORT   5000
set -euo pipefail
umask 077

home=${COPERNICUS_MLFLOW_HOME:-$HOME/copernicus-mlflow}
port=${COPERNICUS_MLFLOW_PORT:-5000}
database=${COPERNICUS_DATABASE:-postgresql}
artifacts=${COPERNICUS_ARTIFACTS:-$home/artifacts}
unset COPERNICUS_DATABASE # it may hold a password: only the server's own environment gets it
log=$home/mlflow.log
ended="mlflow_server: MLflow ended, starting it again"
patience_s=300 # the first start makes the tables, later ones may migrate them

say() { echo "mlflow_server: $*"; }
fail() {
    echo "mlflow_server: $*" >&2
    exit 1
}

healthy() {
    python - "$port" <<'PYTHON'
import sys
import urllib.request

try:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before loopback
    answer = opener.open(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5).read()
    sys.exit(0 if answer.strip() == b"OK" else 1)
except OSError:
    sys.exit(1)
PYTHON
}

# MLflow itself would try for minutes. What SQLAlchemy says of a URI may repeat it, what databases say does not.
openable() {
    MLFLOW_BACKEND_STORE_URI=$1 python - <<'PYTHON'
import os
import sys

import sqlalchemy

try:
    sqlalchemy.create_engine(os.environ["MLFLOW_BACKEND_STORE_URI"]).connect().close()
except sqlalchemy.exc.DBAPIError as error:
    sys.exit(f"mlflow_server: {str(error.orig).splitlines()[0]}")
except (sqlalchemy.exc.ArgumentError, ValueError):
    sys.exit("mlflow_server: this is no URI of a database")
except ImportError as error:
    sys.exit(f"mlflow_server: {error}")
PYTHON
}

# The lock is inherited by all processes of the server: while it cannot be had, one of them lives, and then the number
# in server.pid, their process group's, is still theirs.
running() { ! flock --nonblock "$home/server.lock" true; }

# ---------------------------------------------------------------------------------------------------- PostgreSQL
data=$home/postgresql
socket=$home/socket

postgresql_programs() {
    local version="*" found
    if [ -f "$data/PG_VERSION" ]; then version=$(cat "$data/PG_VERSION"); fi
    # Debian and Ubuntu, Red Hat, then whatever is on PATH. Data made by one version need programs of the same.
    # shellcheck disable=SC2086
    found=$(ls -d /usr/lib/postgresql/$version/bin /usr/pgsql-$version/bin 2>/dev/null | sort -V | tail -n 1) || true
    if [ -z "$found" ] && command -v initdb >/dev/null; then
        found=$(dirname "$(readlink -f "$(command -v initdb)")")
    fi
    [ -n "$found" ] || fail "no PostgreSQL ($version) here: install the distribution's, or set COPERNICUS_DATABASE"
    echo "$found"
}

start_postgresql() {
    [ "$(id -u)" != 0 ] || fail "PostgreSQL does not run as root: be an ordinary user, or set COPERNICUS_DATABASE"
    local programs
    programs=$(postgresql_programs)
    [ "${#socket}" -lt 90 ] || fail "$socket: too long for a Unix socket; set COPERNICUS_MLFLOW_HOME to a shorter path"
    if [ ! -d "$data" ]; then
        rm -rf "$data.part" # of an earlier attempt that was cut off
        "$programs/initdb" --pgdata "$data.part" --auth=peer --encoding=UTF8 --locale=C.UTF-8 \
            >"$home/postgresql.log" 2>&1 || fail "initdb failed; see $home/postgresql.log"
        mv "$data.part" "$data"
        say "made a PostgreSQL database in $data"
    fi
    mkdir -p "$socket"
    if ! "$programs/pg_ctl" --pgdata "$data" status >/dev/null; then
        "$programs/pg_ctl" --pgdata "$data" --log "$home/postgresql.log" --wait --timeout 120 \
            --options "-c listen_addresses='' -c unix_socket_directories='$socket'" start >/dev/null ||
            fail "PostgreSQL did not start; see $home/postgresql.log"
    fi
    local there
    there=$("$programs/psql" --host "$socket" --dbname postgres --no-align --tuples-only \
        --command "select count(*) from pg_database where datname = 'mlflow'")
    if [ "$there" = 0 ]; then "$programs/createdb" --host "$socket" mlflow; fi
}

stop_postgresql() {
    if [ -d "$data" ] && "$(postgresql_programs)/pg_ctl" --pgdata "$data" status >/dev/null; then
        "$(postgresql_programs)/pg_ctl" --pgdata "$data" --mode fast --wait --timeout 120 stop >/dev/null
    fi
}

# ---------------------------------------------------------------------------------------------------- MLflow
stop_server() {
    running || return 0
    local group
    group=$(cat "$home/server.pid")
    kill -TERM -- "-$group" 2>/dev/null || true
    for _ in $(seq 100); do
        running || return 0
        sleep 0.2
    done
    kill -KILL -- "-$group" 2>/dev/null || true
    for _ in $(seq 50); do
        running || return 0
        sleep 0.2
    done
    fail "the server (process group $group) does not end"
}

start_server() {
    local uri=$1 settings ends
    settings=$(printf '%s\n' "$uri" "$artifacts" "$port" | sha256sum | cut -d ' ' -f 1)
    if running; then
        if [ "$(cat "$home/settings" 2>/dev/null)" = "$settings" ] && healthy; then
            say "runs already at http://127.0.0.1:$port"
            return
        fi
        stop_server
    fi
    if healthy; then fail "another server answers at port $port: stop it, or set COPERNICUS_MLFLOW_PORT"; fi
    openable "$uri" || fail "the database cannot be opened"
    echo "$settings" >"$home/settings"
    ends=$(grep -c "$ended" "$log" 2>/dev/null) || true
    # The URI goes by the environment: command lines can be read by all users of a host.
    (
        cd "$home"
        export MLFLOW_BACKEND_STORE_URI=$uri MLFLOW_DISABLE_TELEMETRY=true
        # MLflow's job queue would be eight more processes, for what a tracking server does not need.
        export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
        # shellcheck disable=SC2016
        exec setsid flock --no-fork --nonblock "$home/server.lock" bash -c '
            echo "$$" >server.pid
            while :; do
                # One process: of several, uvicorn kills those that a busy host keeps waiting for 5 s.
                python -m mlflow server --host 127.0.0.1 --port "$1" --workers 1 \
                    --serve-artifacts --artifacts-destination "$2" || true
                # What it left behind would hold the port.
                for left in $(pgrep --pgroup "$$"); do
                    [ "$left" = "$$" ] || kill -KILL "$left" 2>/dev/null || true
                done
                echo "$3"
                sleep 2
            done' mlflow_server "$port" "$artifacts" "$ended" </dev/null >>"$log" 2>&1
    ) &
    for _ in $(seq "$patience_s"); do
        if healthy; then
            say "runs at http://127.0.0.1:$port; artifacts in $artifacts; logs in $home"
            return
        fi
        # A wrong URI or a database that is not there: it would end again and again.
        [ "$(grep -c "$ended" "$log")" -lt $((ends + 3)) ] || break
        sleep 1
    done
    tail -n 20 "$log" >&2
    stop_server
    fail "MLflow does not answer; see $log"
}

start() {
    mkdir -p "$home"
    # One at a time; the lock goes with this process, so what it starts must not inherit it (9>&-).
    exec 9>"$home/start.lock"
    flock --timeout 300 9 || fail "another start is at work in $home"
    case $database in
    postgresql)
        start_postgresql 9>&-
        start_server "postgresql+psycopg2:///mlflow?host=$socket" 9>&-
        ;;
    sqlite) start_server "sqlite:///$home/mlflow.db" 9>&- ;;
    *://*) start_server "$database" 9>&- ;;
    /*)
        [ -f "$database" ] || fail "COPERNICUS_DATABASE: no file $database"
        [ "$(stat -c %a "$database")" = 600 ] || fail "$database holds a password: chmod 600 $database"
        start_server "$(cat "$database")" 9>&-
        ;;
    *) fail "COPERNICUS_DATABASE: none of postgresql, sqlite, a URI (scheme://...), a file with one (/...)" ;;
    esac
}

case ${1:-} in
start) start ;;
stop)
    if [ -d "$home" ]; then
        stop_server
        stop_postgresql
    fi
    say "stopped"
    ;;
status)
    if [ -d "$home" ] && running && healthy; then
        say "runs at http://127.0.0.1:$port"
    else
        fail "does not run; see $log"
    fi
    ;;
*) fail "usage: mlflow_server.sh start|stop|status" ;;
esac
