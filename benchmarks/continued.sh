#!/usr/bin/env bash
# The study "Continuing a policy you trust" (docs/results.md): clone a trained agent, then train on from the clone, with PPO, with a
# KL that is held, and with the clone as the reference policy, too. Then the same where the task has changed: with wind.
#
#     bash benchmarks/continued.sh FOLDER [JOBS]
#
# Runs whose file is in FOLDER are not repeated. At the end, FOLDER/continued.csv holds all of them.
set -euo pipefail
folder=${1:?bash benchmarks/continued.sh FOLDER [JOBS]: name the folder of the runs} jobs=${2:-1}

run() {
    local folder=$1 seed=$2 env=$3 arm=$4 task=$5 kwargs='{}' expert=trained_agents/ppo_kl/$3_1/$3.zip
    if [ "$task" = wind ]; then kwargs='{"enable_wind": true}'; fi
    if [ "$env" = Hopper-v5 ]; then expert=docs/study/Hopper-v5.zip; fi  # arm "default" of judged_nine.yml, seed 50
    python examples/continue_a_policy.py --env "$env" --arm "$arm" --seed "$seed" --env-kwargs "$kwargs" --expert "$expert" \
        --compile --eval-every 20000 -o "$folder/$env-$task-$arm-$seed.csv"
}
export -f run

# Seed by seed, so that an early stop leaves a balanced comparison
{
    printf '%s\n' {0..4}" "{LunarLander-v3,Pendulum-v1,Swimmer-v5,Hopper-v5}" "{ppo,held,reference}" as_cloned"
    printf '%s\n' {0..4}" LunarLander-v3 "{ppo,held,reference}" wind"
} | xargs -P "$jobs" -L 1 bash -c 'run "$0" "$@"' "$folder"

{ head -n 1 "$folder/LunarLander-v3-wind-ppo-0.csv"; tail -qn +2 "$folder"/*-[0-4].csv; } > "$folder/continued.csv"
