#!/usr/bin/env bash
# What needs a GPU, in one command that ends within 8 minutes, on a machine without a network.
#
#   benchmarks/gpu.sh prepare        here: writes what that machine lacks into build/gpu, below 64 MiB
#   benchmarks/gpu.sh run OUT        there: leaves one JSON per part, parts.jsonl and log.txt in the folder OUT
#   benchmarks/gpu.sh run OUT cpu    the same in tiny sizes on the CPU, to try this script
#
# PYTHON says which Python, CARRIED which folder, and PERCENT how much of the time limits counts, for slower machines.
set -u -o pipefail
FROM=$PWD
cd "$(dirname "$0")/.." || exit

PYTHON=${PYTHON:-python3}
CARRIED=${CARRIED:-build/gpu}
PERCENT=${PERCENT:-100}
ALL=480 # seconds
LACKING=(jsonargparse docstring-parser typeshed-client) # Lightning's command line, which types of GeoLoRAModule come from
THERE=3.12 # the version of Python on that machine

prepare() {
    mkdir -p "$CARRIED/wheels" && rm -f "$CARRIED"/wheels/*.whl || return # two versions of one would stop pip
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version $THERE --constraint constraints.txt \
        --dest "$CARRIED/wheels" "${LACKING[@]}" || return
    "$PYTHON" benchmarks/gpu/carried.py --folder "$CARRIED" || return
    local size
    size=$(du -sm "$CARRIED" | cut -f1)
    echo "$CARRIED: $size MiB"
    ((size < 60)) || { echo "that is more than can be carried" >&2 && return 1; }
}

# Run a command as a part of the whole, for at most so many seconds; whatever comes of it, the next part follows.
part() {
    local name=$1 limit=$(($2 * PERCENT / 100)) left=$((ALL * PERCENT / 100 - SECONDS)) start=$SECONDS status=124
    shift 2
    limit=$((limit < left ? limit : left))
    echo "== $name, for at most $limit seconds"
    if ((limit > 0)); then
        timeout --kill-after=5 "$limit" "$PYTHON" "$@"
        status=$?
    fi
    echo "{\"part\": \"$name\", \"exit\": $status, \"seconds\": $((SECONDS - start))}" | tee -a "$OUT/parts.jsonl"
    ((failed += status != 0))
}

run() {
    failed=0
    throughput=benchmarks/speed/throughput.py
    if [[ $WHERE == cpu ]]; then
        small=(step --device cpu --threads 1 --rounds 10 --methods geolora bound)
        sst2=(--device cpu --precision 32-true --batches 2 --epochs 1)
        bert=("${small[@]}" --model bert_tiny --batch_size 8 --length 8)
        vit=("${small[@]}" --model vit_384x6 --batch_size 1)
        event=(--device cpu --threads 1 --rounds 10)
    else
        compared=(step memory --device cuda --threads 8 --methods geolora lora adalora full bound)
        sst2=(--device cuda)
        bert=("${compared[@]}" --model bert_base --batch_size 32 256 --length 128)
        vit=("${compared[@]}" --model vit_base --batch_size 128)
        event=(--device cuda --threads 8 --rounds 40)
    fi
    part cuda_tests 180 benchmarks/gpu/cuda_tests.py
    part sst2 110 benchmarks/gpu/sst2.py --folder "$CARRIED" "${sst2[@]}"
    part bert_base 90 $throughput "${bert[@]}" --name "bert_base_$WHERE"
    part vit_base 90 $throughput "${vit[@]}" --name "vit_base_$WHERE"
    part event 60 $throughput event "${event[@]}"
    echo "== $failed parts failed, $SECONDS seconds in all"
    return $((failed != 0))
}

case "${1:-}" in
    prepare) prepare ;;
    run)
        OUT=${2:?run needs a folder for the results} WHERE=${3:-cuda}
        [[ $OUT == /* ]] || OUT=$FROM/$OUT
        mkdir -p "$OUT" && SITE=$(mktemp -d) || exit
        trap 'rm -rf "$SITE"' EXIT
        # Not into a virtual environment: made from within another, it would not see the packages of that one.
        wheels=("$CARRIED"/wheels/*.whl)
        if [[ -e ${wheels[0]} ]]; then
            "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "${wheels[@]}" || exit
        fi
        export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
        export TOKENIZERS_PARALLELISM=false GEOLORA_RESULTS="$OUT" GEOLORA_FIGURES="$SITE/figures"
        : > "$OUT/parts.jsonl"
        run 2>&1 | tee "$OUT/log.txt"
        ;;
    *)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        exit 2
        ;;
esac
