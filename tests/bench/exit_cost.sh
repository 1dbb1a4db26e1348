#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Runs in a host: exit_cost on the stock and on our modules, with and without a
# tool, in turns.
# exit_cost.sh ROUNDS EXIT_COST STOCK-KVM STOCK-VENDOR OUR-KVM OUR-VENDOR [ARGUMENT...]
rounds=$1 cost=$2 stock_kvm=$3 stock_vendor=$4 our_kvm=$5 our_vendor=$6
shift 6
vendor=$(basename "$stock_vendor" .ko | tr - _)

# Modules can only be taken out when there is no VM
[ ! -f /run/vm-holder.pid ] || kill "$(cat /run/vm-holder.pid)"

use() {
	for i in 1 2 3 4 5 6 7 8 9 10; do
		rmmod $vendor kvm 2>/dev/null && break
		sleep 0.2
	done
	insmod "$1" $3 && insmod "$2"
}

i=0
while [ $i -lt "$rounds" ]; do
	use "$stock_kvm" "$stock_vendor" && echo "stock $("$cost" "$@")" || exit 1
	use "$our_kvm" "$our_vendor" introspection=1 && echo "kvmi $("$cost" "$@")" &&
		echo "hooked $("$cost" "$@" hooked)" || exit 1
	i=$((i + 1))
done
