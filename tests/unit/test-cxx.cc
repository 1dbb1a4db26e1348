/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <kvmi/hooks.h>
#include <kvmi/kvmi.h>

int main()
{
	kvmi_error err = {};
	kvmi_vm *vm = nullptr;
	kvmi_vm_event *event = nullptr;
	kvmi_hooks_callbacks callbacks = {};

	callbacks.page = [](const kvmi_vm_event *e, void *) {
		return e->pf.not_emulated ? KVMI_ACTION_RETRY :
					    KVMI_ACTION_CONTINUE;
	};
	kvmi_hooks_free(kvmi_hooks_new(&callbacks, nullptr, &err));
	kvmi_call *call = nullptr;
	uint64_t gpa;
	if (kvmi_vcpu_start_translate(vm, 0, 0, &gpa, &call, &err) == KVMI_OK)
		kvmi_call_then(call, [](kvmi_vm *, const kvmi_error *,
					void *) {}, nullptr);
	kvmi_vm_on_unhook(vm, [](kvmi_vm *, void *) {}, nullptr, &err);
	kvmi_vm_close(vm);

	return kvmi_vm_wait_event(vm, 0, &event, &err) != KVMI_ERR_ARGUMENT;
}
