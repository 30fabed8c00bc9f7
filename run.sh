#!/usr/bin/env bash
# Run all stages from a fresh clone to a chat: bash run.sh. All switches: bash run.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly py=.venv/bin/python
readonly stages=(setup tokenizer data pretrain sft eval chat)

usage() {
  cat <<'END'
usage: bash run.sh [switches] [-- arguments of the stage's script]

Sets up .venv, trains a tokenizer, builds the data, pretrains, fine-tunes, evaluates, and starts a chat. Finished stages are
skipped; an interrupted stage continues where it stopped.

  --preset NAME   use configs/NAME.yaml; results go to data/NAME and out/NAME:
                    tiny (default)  short Chinese poems: minutes on two CPU cores
                    poet            better ones: about an hour on two CPU cores
                    bilingual       Chinese and English: an hour and a half or more on two CPU cores
                    small           one 24 GB GPU
                    base            eight GPUs
  --stage NAME    all (default) or one stage; a stage that you name runs even if it is finished:
                    setup           .venv with pinned dependencies (setup.sh)
                    tokenizer       train_tokenizer.py
                    data            data_process.py
                    pretrain        pretrain.py
                    sft             fine_tuning.py
                    eval            eval.py --task loss and --task poems
                    chat            eval.py; without a terminal it prints a few example answers instead
                    quant           quantize.py: the model in 4 bits, then a chat with it; not part of all
                  after pretrain, sft, eval and quant, report.py writes out/NAME/report.html about all runs so far
  --minutes N     take about N minutes from the tokenizer to the evaluation: where the machine is too slow for all steps of the
                  preset, both trainings do fewer, and their learning rates follow the time
  --use HOW       processes of pretrain and sft:
                    single          one (default)
                    ddp             several, each with the whole model
                    fsdp            several, each with a part of weights, gradients and moments (FSDP2)
                    deepspeed       likewise with DeepSpeed's ZeRO, which the setup installs; trains with AdamW
  --nproc N       number of processes for these on this machine (default: one per GPU; 2 on a CPU)
  --nnodes N      number of machines; run the same command on each, for --stage pretrain or sft, with
  --node_rank R   its number, 0 on the first, and with
  --master HOST   the name or address of the first one
  --hostfile FILE start the processes of all machines in it, by the launcher of DeepSpeed over ssh; for --use deepspeed and
                  --stage pretrain or sft. Each line: HOST slots=N
  --background    keep running after the terminal is closed; the log is out/NAME/run.log
  --dry_run       print the commands instead of running them
  --help          print this text

Arguments after -- go to the script of the stage that --stage names:
  bash run.sh --stage pretrain -- --train.max_steps 100
  bash run.sh --stage chat -- --prompt '写一首五言绝句'

PYTHON=/path/to/python3.12 selects the interpreter; TORCH_ALLOW_PYPI=1 allows PyPI's torch if no CPU build is available.
END
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

misused() { # prints a mistake on the command line and exits
  printf 'error: %s (bash run.sh --help)\n' "$*" >&2
  exit 2
}

list() { # prints "a, b, c" for the words a b c
  local joined
  joined=$(printf '%s, ' "$@")
  echo "${joined%, }"
}

contains() { # is the first word among the others?
  local word=$1 other
  shift
  for other in "$@"; do
    if [ "$word" = "$other" ]; then return 0; fi
  done
  return 1
}

gpus() { # prints the number of GPUs that this process may use; 0 without a working driver
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    # shellcheck disable=SC2086  # a list that has to be split; -1 hides all GPUs
    (IFS=,; set -- ${CUDA_VISIBLE_DEVICES#-1}; echo $#)
  else
    (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true
  fi
}

parse_switches() {
  preset=tiny stage=all minutes='' use=single nproc='' nnodes='' node_rank='' master='' hostfile='' background='' dry_run='' extra=()
  while [ $# -gt 0 ]; do
    case $1 in
      --preset | --stage | --minutes | --use | --nproc | --nnodes | --node_rank | --master | --hostfile)
        [ $# -gt 1 ] || misused "$1 expects a value"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
      --preset=* | --stage=* | --minutes=* | --use=* | --nproc=* | --nnodes=* | --node_rank=* | --master=* | --hostfile=*) set -- "$1" "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --background) background=yes ;;
      --dry_run) dry_run=yes ;;
      -h | --help) usage && exit ;;
      --) shift && extra=("$@") && break ;;
      *) misused "unknown switch $1; switches are --preset, --stage, --minutes, --use, --nproc, --nnodes, --node_rank, --master, --hostfile, --background, --dry_run, --help, and --" ;;
    esac
    shift
  done
  check_switches
}

check_switches() {
  local presets=(configs/*.yaml)
  presets=("${presets[@]#configs/}")
  presets=("${presets[@]%.yaml}")
  contains "$preset" "${presets[@]}" || misused "unknown preset $preset; presets are $(list "${presets[@]}")"
  contains "$stage" all "${stages[@]}" quant || misused "unknown stage $stage; stages are $(list all "${stages[@]}" quant)"
  contains "$use" single ddp fsdp deepspeed || misused "--use should be single, ddp, fsdp or deepspeed, found $use"
  [[ "$minutes" =~ ^([1-9][0-9]{0,5})?$ ]] || misused "--minutes expects a whole number of minutes, found $minutes"
  if [ -n "$minutes" ] && [ "$stage" != all ]; then misused "--minutes is for a whole run; for stage $stage there is -- --train.max_minutes"; fi
  [[ "$nproc" =~ ^([1-9][0-9]{0,3})?$ ]] || misused "--nproc expects a positive number, found $nproc"
  if [ "$use" = single ] && [ "${nproc:-1}" != 1 ]; then misused "--nproc $nproc needs --use ddp, fsdp or deepspeed"; fi
  if [ "${nproc:-1}" -gt 2 ] && [ -z "$dry_run" ]; then check_nproc; fi
  check_nodes
  if [ -n "$hostfile" ]; then check_hostfile; fi
  if [ ${#extra[@]} -gt 0 ] && [ "$stage" = all ]; then
    misused "arguments after -- go to one script; name its stage with --stage: one of $(list "${stages[@]:1}" quant)"
  fi
}

# Every process loads PyTorch, 0.3 GB, before it can find out that there are too many of them.
check_nproc() {
  local most what=GPUs
  most=$(gpus)
  if [ "$most" = 0 ]; then most=$(getconf _NPROCESSORS_ONLN) what='processor cores'; fi
  [ "$nproc" -le "$most" ] || misused "--nproc $nproc is more than the $most $what of this machine: use $most or fewer"
}

check_nodes() { # several machines: which one is this, and do they know each other?
  [[ "$nnodes" =~ ^([1-9][0-9]*)?$ ]] || misused "--nnodes expects a positive number, found $nnodes"
  if [ "${nnodes:-1}" = 1 ]; then
    [ -z "$node_rank$master" ] || misused "--node_rank and --master need --nnodes above 1"
    return
  fi
  [ "$use" != single ] || misused "--nnodes $nnodes needs --use ddp, fsdp or deepspeed"
  contains "$stage" pretrain sft || misused "--nnodes $nnodes needs --stage pretrain or sft: the other stages run on one machine"
  if ! [[ "$node_rank" =~ ^[0-9]+$ ]] || [ "$node_rank" -ge "$nnodes" ]; then
    misused "--nnodes $nnodes needs --node_rank 0 to $((nnodes - 1)), another one on every machine, found ${node_rank:-none}"
  fi
  [ -n "$master" ] || misused "--nnodes $nnodes needs --master with the name or address of the machine of --node_rank 0"
}

# DeepSpeed's launcher trains on this machine alone if the file is missing, and shows a traceback if a line is wrong.
check_hostfile() {
  local line host slots number=0 hosts=()
  [ "$use" = deepspeed ] || misused "--hostfile needs --use deepspeed, found $use"
  contains "$stage" pretrain sft || misused "--hostfile needs --stage pretrain or sft: the other stages run on one machine"
  [ -z "$nproc$nnodes" ] || misused "--hostfile says which machines and how many processes: remove --nproc and --nnodes"
  [ -f "$hostfile" ] || misused "--hostfile $hostfile: no such file"
  while read -r line || [ -n "$line" ]; do
    number=$((number + 1)) line=${line%$'\r'} # a file from Windows
    case $line in '' | '#'*) continue ;; esac
    read -r host slots <<<"$line"
    [[ "$slots" =~ ^slots=[1-9][0-9]*$ ]] || misused "--hostfile $hostfile, line $number: expected HOST slots=N, found $line"
    ! contains "$host" ${hosts[@]+"${hosts[@]}"} || misused "--hostfile $hostfile, line $number: $host is named twice"
    hosts+=("$host")
  done <"$hostfile"
  [ ${#hosts[@]} -gt 0 ] || misused "--hostfile $hostfile names no machine: expected lines HOST slots=N"
}

# Runs a command with the terminal's input and Ctrl-C, and passes SIGTERM on to it, because training saves before it ends.
# A command in the foreground would not get the signal: bash handles a signal only after its command has ended.
execute() {
  if [ -n "$dry_run" ]; then
    show "$@"
    return
  fi
  if [ -n "$stopped" ]; then return "$stopped"; fi
  local status=0
  echo "\$ $(show "$@")"
  (trap - INT TERM; exec "$@") <&0 &
  child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # the child still runs: a signal ended the wait
    status=0
    wait "$child" || status=$?
  done
  return "${stopped:-$status}"
}

show() { # prints a command with quotes, so that it can be typed again
  local line
  line=$(printf '%q ' "$@")
  echo "${line% }"
}

script() { # runs a script with the preset's config
  execute "$py" "$1" --config "$config" "${@:2}" ${extra[@]+"${extra[@]}"}
}

# Runs a training script in one process, or in several with torchrun. torchrun is called as a module, because its script
# fails in a path with spaces.
train() {
  local launch=(env) limit=() optimizer=() threads
  if [ -n "$minutes" ]; then limit=(--train.max_minutes "$(minutes_for "$2")"); fi
  if [ "$use" = single ]; then
    script "$1" --train.backend single ${limit[@]+"${limit[@]}"}
    return
  fi
  if [ "$use" = deepspeed ]; then optimizer=(--optim.optimizer adamw); fi # Muon needs whole matrices
  if [ -n "$hostfile" ]; then
    launch=(.venv/bin/deepspeed --hostfile "$hostfile")
  else
    threads=$(($(getconf _NPROCESSORS_ONLN) / nproc))
    launch+=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" "$py" -m torch.distributed.run)
    if [ "${nnodes:-1}" -gt 1 ]; then
      launch+=(--nnodes "$nnodes" --node_rank "$node_rank" --master_addr "$master" --master_port "${MASTER_PORT:-29500}")
    else
      launch+=(--standalone)
    fi
    launch+=(--nproc_per_node "$nproc")
  fi
  execute "${launch[@]}" "$1" --config "$config" --train.backend "$use" ${limit[@]+"${limit[@]}"} \
    ${optimizer[@]+"${optimizer[@]}"} ${extra[@]+"${extra[@]}"}
}

run_stage() {
  case $1 in
    setup) if [ "$use" = deepspeed ]; then execute bash setup.sh --extra deepspeed; else execute bash setup.sh; fi ;;
    tokenizer) script train_tokenizer.py ;;
    data) script data_process.py ;;
    pretrain) train pretrain.py pretrain ;;
    sft) train fine_tuning.py sft ;;
    eval) script eval.py --task loss && script eval.py --task poems ;;
    quant) execute rm -rf "$out/quant" && script quantize.py ;; # quantize.py replaces no model
  esac
}

write_report() { # writes a page about all runs of the preset; no run fails by it
  local page=$out/report.html
  if execute "$py" report.py "$out" --out "$page"; then
    if [ -z "$dry_run" ]; then echo "report of all stages, a page for your browser: $page"; fi
  elif [ -n "$stopped" ]; then
    exit "$stopped"
  else
    echo "no report was written (details above)" >&2
  fi
}

chat() { # replaces this script by the chat, which then gets the terminal and its signals
  local command=("$py" eval.py --config "$config" "$@" ${extra[@]+"${extra[@]}"})
  if [ ${#extra[@]} -eq 0 ] && ! { [ -t 0 ] && [ -t 1 ]; }; then command+=(--demo true); fi
  if [ -n "$dry_run" ]; then show "${command[@]}" && exit; fi
  drop_lock
  exec "${command[@]}"
}

# A finished stage has a stamp file with a key: a checksum of the preset's file and of the previous stage's stamp, which holds
# a date and a process number and so changes whenever that stage ran. The code is not part of the key: a changed comment
# must not retrain a model, and --stage repeats a stage. A changed key costs seconds, because every script compares its own
# section and inputs and returns at once if its output is complete. Stamps only avoid starting Python six times.
key_of() {
  local name before=''
  for name in "${stages[@]}"; do
    if [ "$name" = "$1" ]; then break; fi
    before=$name
  done
  { cat "$config" "$stamps/$before" 2>/dev/null || true; } | cksum | tr ' ' '-'
}

is_done() { # has the stage a stamp with the present key, and does its output exist?
  local output key=''
  case $1 in
    tokenizer) output=$data/tokenizer ;;
    data) output=$data/heldout.bin ;;
    pretrain) output=$out/pretrain/last ;;
    sft | eval) output=$out/sft/last ;;
  esac
  if [ -f "$stamps/$1" ]; then read -r key _ <"$stamps/$1"; fi
  [ -e "$output" ] && [ "$key" = "$(key_of "$1")" ]
}

# Runs a stage, prints a header before it, and writes down its time, also if it stops, because it will continue from there.
work_on() {
  local name=$1 key=$2 status=0 started=$SECONDS
  echo "${dry_run:+# }== $name (preset $preset)$(time_left "$name")"
  run_stage "$name" || status=$?
  if [ -n "$dry_run" ]; then return; fi
  note_time "$name" $((SECONDS - started)) "$status" "$key"
  case $status in
    0) ;;
    130 | 143) printf 'stopped in stage %s; repeat the command to continue\n' "$name" >&2 ;;
    *) printf 'error: stage %s ended with status %s (details above); fix the cause, then repeat the command to continue\n' "$name" "$status" >&2 ;;
  esac
  if [ "$status" -ne 0 ]; then exit "$status"; fi
}

make() { # runs a stage unless it is done, and writes its stamp
  local name=$1 key
  if [ "$stage" = all ] && is_done "$name"; then
    echo "${dry_run:+# }== $name: done earlier"
    return
  fi
  key=$(key_of "$name") # computed before the work, because the config may be edited during it
  if [ ${#extra[@]} -gt 0 ]; then key=none; fi # not the result of the preset: the next whole run has to check it
  if [ -z "$dry_run" ]; then rm -f "$stamps/$name"; fi
  work_on "$name" "$key"
  if [ -z "$dry_run" ]; then echo "$key $(date '+%Y-%m-%dT%H:%M:%S') $$" >"$stamps/$name"; fi
}

note_time() { # appends name, seconds, status and key to the table of times; no row for less than a second
  if [ "$2" -gt 0 ]; then printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$(date '+%Y-%m-%dT%H:%M:%S')" "$4" >>"$times"; fi
}

# Prints the wall time of a stage with its present key: the sum over all calls up to the first that completed it.
seconds_of() {
  local name seconds status key sum=0 present
  present=$(key_of "$1")
  while IFS=$'\t' read -r name seconds status _ key; do
    if [ "$name $key" != "$1 $present" ]; then continue; fi
    sum=$((sum + seconds))
    if [ "$status" = 0 ]; then break; fi
  done <"$times"
  echo "$sum"
}

# Measures some steps of both trainings, and writes to a file how many seconds each stage will take on this machine.
foresee() {
  if is_done pretrain && is_done sft && is_done eval; then return; fi
  execute "$py" -m planning.whole_run "$config" "$foreseen" || { rm -f "$foreseen" && return "${stopped:-0}"; }
  if [ -n "$minutes" ] && [ $((minutes * 60)) -lt $(($(foreseen_seconds tokenizer data eval) + 90)) ]; then
    fail "--minutes $minutes is too short: what is no training takes $(foreseen_seconds tokenizer data eval) seconds here, and" \
      "two trainings need more than the rest"
  fi
}

foreseen_seconds() { # prints the sum of the seconds that these stages will take; 0 for what is not known
  local name seconds sum=0
  while read -r name seconds; do
    if contains "$name" "$@"; then sum=$((sum + seconds)); fi
  done < <(cat "$foreseen" 2>/dev/null)
  echo "$sum"
}

minutes_for() { # prints the minutes of a training, which has its share of what --minutes leaves to both
  local left pretrain sft
  pretrain=$(foreseen_seconds pretrain) sft=$(foreseen_seconds sft)
  if [ "$((pretrain * sft))" = 0 ]; then pretrain=55 sft=45; fi
  # 10 seconds of each are for loading, and for the evaluation at the end
  left=$((minutes * 60 - $(seconds_of tokenizer) - $(seconds_of data) - $(foreseen_seconds eval) - 20))
  if [ "$1" = pretrain ]; then left=$((left * pretrain / (pretrain + sft))); else left=$((left - $(seconds_of pretrain) + 10)); fi
  if [ "$left" -lt 15 ]; then left=15; fi
  printf '%d.%02d\n' $((left / 60)) $((left % 60 * 100 / 60))
}

# Prints ": about N min left" for the stage of this name and those after it, if that is known. What pretraining took says more
# about fine-tuning than the steps that were measured, unless it was cut.
time_left() {
  local name left=0 rest pretrain
  if [ "$stage" != all ] || [ "$1" = setup ] || [ -n "$dry_run" ] || [ "$(foreseen_seconds pretrain)" = 0 ]; then return; fi
  for name in eval sft pretrain data tokenizer; do
    rest=$(foreseen_seconds "$name") pretrain=$(seconds_of pretrain)
    if [ "$name" = sft ] && [ "$1" = sft ] && [ -z "$minutes" ] && [ "$pretrain" -gt 0 ]; then
      rest=$((rest * pretrain / $(foreseen_seconds pretrain)))
    fi
    left=$((left + rest))
    if [ "$name" = "$1" ]; then break; fi
  done
  if [ -n "$minutes" ]; then # it may be cut
    rest=$((minutes * 60))
    for name in tokenizer data pretrain sft; do rest=$((rest - $(seconds_of "$name"))); done
    if [ "$rest" -lt "$(foreseen_seconds eval)" ]; then rest=$(foreseen_seconds eval); fi # which is never cut
    if [ "$left" -gt "$rest" ]; then left=$rest; fi
  fi
  if [ "$left" -ge 90 ]; then left=$(((left + 30) / 60))' min'; else left="$left s"; fi
  echo ": about $left left of all stages"
}

print_times() {
  local name seconds total=0
  printf '\n%-12s %8s\n' stage seconds
  for name in "${stages[@]:0:6}"; do
    seconds=$(seconds_of "$name")
    total=$((total + seconds))
    printf '%-12s %8d\n' "$name" "$seconds"
  done
  printf '%-12s %8d   (calls are listed in %s)\n\n' total "$total" "$times"
}

writes() { # does this call write to files that another run would write, too?
  ! contains "$stage" setup eval chat && [ "${node_rank:-0}" = 0 ] # the lock is that of the first machine
}

check_lock() { # fails if another run writes to the same folders, because both results would be damaged
  local holder
  holder=$(cat "$lock" 2>/dev/null || true)
  if [ -n "$holder" ] && [ "$holder" != $$ ] && kill -0 "$holder" 2>/dev/null; then
    fail "process $holder is running preset $preset: wait for it or stop it (kill $holder);" \
      "if that process is another program, remove $lock"
  fi
}

take_lock() {
  check_lock
  echo $$ >"$lock"
  trap drop_lock EXIT
}

drop_lock() {
  if [ "$(cat "$lock" 2>/dev/null)" = $$ ]; then rm -f "$lock"; fi
}

go_background() {
  local command=(nohup bash run.sh --preset "$preset" --stage "$stage" ${minutes:+--minutes "$minutes"} --use "$use" ${nproc:+--nproc "$nproc"})
  if [ -n "$nnodes" ]; then command+=(--nnodes "$nnodes"); fi
  if [ -n "$master" ]; then command+=(--node_rank "$node_rank" --master "$master"); fi
  if [ -n "$hostfile" ]; then command+=(--hostfile "$hostfile"); fi
  if [ ${#extra[@]} -gt 0 ]; then command+=(-- "${extra[@]}"); fi
  if [ -n "$dry_run" ]; then
    echo "$(show "${command[@]}") >>$(show "$log") 2>&1 </dev/null &"
    return
  fi
  check_lock
  "${command[@]}" >>"$log" 2>&1 </dev/null &
  # Lock now, for a second call may come before the new bash has started; nohup keeps the process number.
  if writes; then echo $! >"$lock"; fi
  echo "running as process $!"
  echo "  follow it:  tail -f $(show "$log")"
  echo "  stop it:    kill $!   (repeat the command to continue)"
}

main() {
  local name
  parse_switches "$@"
  config=configs/$preset.yaml data=data/$preset out=out/$preset
  stamps=$out/.done times=$out/times.tsv lock=$out/.lock log=$out/run.log
  foreseen=$out/.foreseen
  if [ -z "$dry_run" ]; then mkdir -p "$stamps" && touch "$times"; fi
  if [ -n "$background" ]; then go_background && exit; fi

  if [ "$use" != single ] && [ -z "$nproc$hostfile" ]; then
    nproc=$(gpus)
    if [ "$nproc" = 0 ]; then nproc=2; fi
  fi
  stopped='' child=''
  trap 'stopped=130' INT # the terminal sends Ctrl-C to the child as well
  trap 'stopped=143; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi' TERM
  export PYTHONUNBUFFERED=1 # so that a log shows each line at once
  export PYTHONUTF8=1 # in the C locale, torch fails if its path has Chinese characters
  # By default, OpenMP threads keep a core busy while they wait for each other. Beside another busy program, they then wait
  # for a thread that gets no core, and training was measured to be seven times slower.
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

  if [ -z "$dry_run" ] && writes; then take_lock; fi
  work_on setup "$(key_of setup)"
  if [ "$stage" = all ] && [ -z "$dry_run" ]; then foresee; fi
  for name in "${stages[@]:1:5}"; do
    if contains "$stage" all "$name"; then make "$name"; fi
  done
  if [ "$stage" = all ] && [ -z "$dry_run" ]; then print_times; fi
  if contains "$stage" all pretrain sft eval; then write_report; fi
  if contains "$stage" all chat; then chat; fi
  if [ "$stage" = quant ]; then
    work_on quant none
    write_report
    extra=() # they were for quantize.py
    chat --model "$out/quant"
  fi
}

main "$@"
