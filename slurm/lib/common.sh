_skyrl_common=$(python3 "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.py" shell-functions) || return 71
eval "$_skyrl_common"
