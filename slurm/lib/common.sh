_skyrl_common="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.py"
eval "$(python3 "$_skyrl_common" shell-functions)"
