#!/bin/bash
# The essentials of launch.tpu with gcloud alone: asks for a slice, waits, asks again when it is taken away, ends with the run.
#
#   launch/queued_resource.sh NAME v6e-64 v2-alpha-tpuv6e us-east5-a gs://BUCKET BUNDLE_SHA256 --config=configs/x.py [--config.a=v]
#
# Flags for gcloud create go into CREATE, as CREATE='--spot --service-account=…'. The bundle (python -m launch.tpu bundle) lies
# in gs://BUCKET/bundles/. Run it again, and it goes on with the slice that there is. It keeps nothing but objects in the bucket;
# it knows one zone and one kind of failure, and brakes after MAX attempts. launch.tpu knows more.
set -euo pipefail
[[ $# -ge 7 ]] || { sed -n '2,5p' "$0" >&2; exit 2; }
name=$1 type=$2 runtime=$3 zone=$4 bucket=$5 bundle=$6
shift 6
folder="runs/$name"
pause=${PAUSE:-30}

say() { echo "$(date +%T) $*" >&2; }
tpus() { gcloud compute tpus queued-resources "$@" --zone="$zone"; }

state() {  # of the attempt's slice; NONE when the service says that there is none; stops here when it does not answer
  local said
  if said=$(tpus describe "$name-a$attempt" '--format=json(state.state)' 2>&1); then
    grep -o '"state": "[A-Z_]*"' <<< "$said" | cut -d'"' -f4
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else
    say "$said"
    echo UNKNOWN
  fi
}

create() {
  local words script
  printf -v words '"%s", ' "$@"
  [[ $words != *\\* && $* != *\"* ]] || { say 'flags with " or \ are not for this script'; exit 2; }
  script=$(mktemp)
  echo "$attempt" > "$script"
  gcloud storage cp "$script" "$bucket/$folder/launch/fence" --quiet  # machines of earlier attempts stop
  { echo '#!/bin/bash'
    printf '%s=%q\n' RUN "$name" ATTEMPT "$attempt" BUCKET "$bucket" FOLDER "$folder" BUNDLE "$bundle" WORKER \
      "{\"run\": \"$name\", \"attempt\": $attempt, \"workdir\": \"$folder\", \"bucket\": \"$bucket\", \"train\": [${words%, }],
        \"secrets\": {}, \"pause_seconds\": $pause}"
    tail -n +2 "$(dirname "$0")/startup.sh"
  } > "$script"
  # shellcheck disable=SC2086  # CREATE is words
  tpus create "$name-a$attempt" --node-id="$name-a$attempt" --accelerator-type="$type" --runtime-version="$runtime" \
    --valid-until-duration=6h --scopes=cloud-platform --labels="maxlm-run=$name" \
    --metadata-from-file="startup-script=$script" --async --quiet ${CREATE:-} || say 'not yet'
  rm "$script"
}

node() { gcloud compute tpus tpu-vm describe "$name-a$attempt" --zone="$zone" '--format=value(state)' 2> /dev/null || true; }

reports() { gcloud storage cat "$bucket/$folder/launch/a$attempt/*.json" 2> /dev/null || true; }

remove() {  # and waits until nothing of it is there, that may cost or write
  until [[ $(state) == NONE ]]; do
    tpus delete "$name-a$attempt" --force --async --quiet || true
    sleep "$pause"
  done
}

attempt=$(gcloud storage cat "$bucket/$folder/launch/fence" 2> /dev/null || echo 1)
while [[ $attempt -le ${MAX:-100} ]]; do
  now=$(state)
  [[ $now == "${last:-}" ]] || say "$name-a$attempt $now"
  last=$now
  ended=$(reports | grep '"phase": "ended"' || true)
  if grep -q '"code": 0,' <<< "$ended"; then
    remove
    say "$name has finished"
    exit 0
  elif grep -q '"code": 2,' <<< "$ended"; then
    remove
    say "$name: a mistake that a person mends: $ended"
    exit 1
  elif [[ -n $ended || $now =~ ^(FAILED|SUSPENDING|SUSPENDED)$ || $now == ACTIVE && $(node) =~ ^(PREEMPTED|TERMINATED)$ ]]; then
    remove
    attempt=$((attempt + 1))
  elif [[ $now == NONE ]]; then
    create "$@"
  fi
  sleep "$pause"
done
say "$name: $((attempt - 1)) attempts"
exit 1
