#!/usr/bin/env bash
# The study "Continuing a policy you trust" (docs/results.md): clone a trained agent, then train on from the clone, with PPO, with a
# KL that is held, and with the clone as the reference policy, too. Then the same where the task has changed: with wind.
#
#     bash benchmarks/continued.sh FOLDER [JOBS]
#
# Runs whose file is in FOLDER are not repeated. docs/study/continued.csv holds all of them.
set -euo pipefail
folder=$1 jobs=${2:-1}

run() {
    local folder=$1 env=$2 seed=$3 arm=$4 task=$5 kwargs='{}'
    if [ "$task" = wind ]; then kwargs='{"enable_wind": true}'; fi
    python examples/continue_a_policy.py --env "$env" --arm "$arm" --seed "$seed" --env-kwargs "$kwargs" --compile \
        --eval-every 20000 -o "$folder/$env-$task-$arm-$seed.csv"
}
export -f run

{
    printf '%s\n' {LunarLander-v3,Pendulum-v1,Swimmer-v5,Hopper-v5}" "{0..4}" "{ppo,held,reference}" "as_cloned
    printf '%s\n' "LunarLander-v3 "{0..4}" "{ppo,held,reference}" wind"
} | xargs -P "$jobs" -L 1 bash -c 'run "$0" "$@"' "$folder"
