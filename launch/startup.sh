#!/bin/bash
# Runs on every machine of a slice, as root, whenever it boots: fetches the code of the run, verifies it, mounts the bucket,
# and hands the rest to systemd, which starts the run again whatever ends it. Above this line launch/bootstrap.py puts the
# values RUN, ATTEMPT, BUCKET, FOLDER, BUNDLE, WORKER (JSON). ROOT is for tests.
set -euo pipefail
ROOT="${ROOT:-}"
HOME_DIR="$ROOT/opt/maxlm"
CODE="$HOME_DIR/$BUNDLE"
MOUNT="$ROOT/mnt/maxlm"
export PATH="$PATH:/snap/bin"
umask 077
mkdir -p "$HOME_DIR" "$MOUNT" "$ROOT/etc/systemd/system"
exec >> "$HOME_DIR/startup.log" 2>&1
echo "$(date --utc +%FT%TZ) $RUN attempt $ATTEMPT"

again() {  # a command, with growing pauses: networks and permissions arrive after a machine does
  local pause=1
  until "$@"; do
    [[ $pause -lt 600 ]] || return 1
    echo "again in $pause s: $1 $2"
    sleep "$pause"
    pause=$((pause * 2))
  done
}

# A machine of an attempt that was given up does nothing.
fence="$(again gcloud storage cat "$BUCKET/$FOLDER/launch/fence")"
if [[ "$fence" != "$ATTEMPT" ]]; then
  echo "attempt $fence has taken over"
  exit 0
fi

if [[ ! -e "$CODE/bundle.json" ]]; then
  rm -rf "$CODE.tar.gz" "$CODE.part"
  again gcloud storage cp "$BUCKET/bundles/$BUNDLE.tar.gz" "$CODE.tar.gz" --quiet
  echo "$BUNDLE  $CODE.tar.gz" | sha256sum --check --quiet
  mkdir "$CODE.part"
  tar --no-same-owner -xzf "$CODE.tar.gz" -C "$CODE.part"
  mv "$CODE.part" "$CODE"
  rm "$CODE.tar.gz"
fi
PYTHON="$CODE/python/bin/python3.12"
[[ -x "$PYTHON" ]] || PYTHON="$(command -v python3.12)"

if ! mountpoint -q "$MOUNT"; then
  command -v gcsfuse > /dev/null || dpkg -i "$CODE/gcsfuse.deb"
  name="${BUCKET#gs://}"
  prefix="${name#"${name%%/*}"}"
  # What one machine writes the others see at once.
  again gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 ${prefix:+--only-dir="${prefix#/}"} "${name%%/*}" "$MOUNT"
fi

printf '%s' "$WORKER" > "$HOME_DIR/worker.json"
cat > "$ROOT/etc/systemd/system/maxlm.service" << UNIT
[Unit]
Description=MaxLM run $RUN
After=network-online.target

[Service]
WorkingDirectory=$CODE
Environment=PYTHONPATH=$CODE/site PYTHONUNBUFFERED=1 PATH=$PATH
Environment=JAX_COMPILATION_CACHE_DIR=$HOME_DIR/jax
ExecStart=$PYTHON -m launch.worker $HOME_DIR/worker.json $MOUNT
KillMode=mixed
TimeoutStopSec=45
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable maxlm.service
systemctl start maxlm.service
echo "$(date --utc +%FT%TZ) handed to systemd"
