// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: what the tool has written into the guest and must not
 * stay there without it
 *
 * A breakpoint that nobody answers for kills the guest.  So KVM remembers what
 * was there before (one entry for each byte), and puts it back when the session
 * ends, unless the tool, or the guest, has changed it meanwhile.
 */
#include <linux/mm.h>
#include <linux/random.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "kvmi_int.h"
#include "trace.h"

#define KVMI_JOURNAL_BITS 13

struct kvmi_journal_entry {
	struct hlist_node node;
	u64 gpa;
	u8 before;
	u8 written;
};

/*
 * Called with kvm->srcu read side held, for a range inside one page; *writable,
 * if that is asked for, is false for what the guest can only read.
 */
static unsigned long kvmi_hva(struct kvm *kvm, u64 gpa,
			      struct kvm_memory_slot **slot, bool *writable)
{
	gfn_t gfn = gpa_to_gfn(gpa);
	unsigned long hva;

	*slot = gfn_to_memslot(kvm, gfn);
	hva = gfn_to_hva_memslot_prot(*slot, gfn, writable);
	if (kvm_is_error_hva(hva) || kvm_mem_is_private(kvm, gfn))
		return KVM_HVA_ERR_BAD;

	return hva + offset_in_page(gpa);
}

static void kvmi_mark_dirty(struct kvm_memory_slot *slot, u64 gpa)
{
	if (kvm_slot_dirty_track_enabled(slot) && slot->dirty_bitmap)
		set_bit_le(gpa_to_gfn(gpa) - slot->base_gfn,
			   slot->dirty_bitmap);
}

/* As hash_64(), but with a factor that the tool doesn't know */
static struct hlist_head *kvmi_journal_head(struct kvmi_journal *journal,
					    u64 gpa)
{
	return &journal->heads[(gpa * journal->key) >>
			       (64 - KVMI_JOURNAL_BITS)];
}

static struct kvmi_journal_entry *
kvmi_journal_find(struct kvmi_journal *journal, u64 gpa)
{
	struct kvmi_journal_entry *entry;

	if (!journal->nr)
		return NULL;

	hlist_for_each_entry(entry, kvmi_journal_head(journal, gpa), node) {
		if (entry->gpa == gpa)
			return entry;
	}

	return NULL;
}

static void kvmi_journal_drop(struct kvmi_journal *journal,
			      struct kvmi_journal_entry *entry)
{
	hlist_del(&entry->node);
	kfree(entry);
	WRITE_ONCE(journal->nr, journal->nr - 1);
}

static int kvmi_journal_add(struct kvmi_journal *journal, u64 gpa, u8 before)
{
	struct kvmi_journal_entry *entry;

	if (journal->nr == KVMI_MAX_JOURNAL)
		return -KVM_E2BIG;

	if (!journal->heads) {
		journal->heads = kvcalloc(BIT(KVMI_JOURNAL_BITS),
					  sizeof(*journal->heads),
					  GFP_KERNEL_ACCOUNT);
		journal->key = get_random_u64() | 1;
	}
	entry = journal->heads ? kmalloc(sizeof(*entry), GFP_KERNEL_ACCOUNT) :
				 NULL;
	if (!entry)
		return -KVM_ENOMEM;

	entry->gpa = gpa;
	entry->before = before;
	entry->written = before;
	hlist_add_head(&entry->node, kvmi_journal_head(journal, gpa));
	WRITE_ONCE(journal->nr, journal->nr + 1);
	return 0;
}

/* Shall what is written over the byte be taken back at the end? */
static bool kvmi_journal_wants(u8 before, u8 after, u16 flags)
{
	if (flags & KVMI_WRITE_KEEP || before == after)
		return false;

	return flags & KVMI_WRITE_JOURNAL || after == KVMI_BREAKPOINT_BYTE;
}

static int kvmi_journal_write(struct kvmi_journal *journal, u64 gpa,
			      const u8 *before, const u8 *after, size_t size,
			      u16 flags)
{
	struct kvmi_journal_entry *entry;
	size_t i;
	int err;

	lockdep_assert_held(&journal->lock);

	for (i = 0; i < size; i++) {
		entry = kvmi_journal_find(journal, gpa + i);
		/* The guest may have changed it; what it put there counts */
		if (entry && entry->written != before[i]) {
			kvmi_journal_drop(journal, entry);
			entry = NULL;
		}
		if (entry || !kvmi_journal_wants(before[i], after[i], flags))
			continue;

		err = kvmi_journal_add(journal, gpa + i, before[i]);
		if (err)
			return err;
	}

	return 0;
}

/* The write has been made: entries are for what is there now */
static void kvmi_journal_written(struct kvmi_journal *journal, u64 gpa,
				 const u8 *after, size_t size, u16 flags)
{
	struct kvmi_journal_entry *entry;
	size_t i;

	for (i = 0; i < size; i++) {
		entry = kvmi_journal_find(journal, gpa + i);
		if (!entry)
			continue;
		if (kvmi_journal_wants(entry->before, after[i], flags))
			entry->written = after[i];
		else
			kvmi_journal_drop(journal, entry);
	}
}

/* The write has failed: entries that were made for it have nothing to undo */
static void kvmi_journal_not_written(struct kvmi_journal *journal, u64 gpa,
				     size_t size)
{
	struct kvmi_journal_entry *entry;
	size_t i;

	for (i = 0; i < size; i++) {
		entry = kvmi_journal_find(journal, gpa + i);
		if (entry && entry->written == entry->before)
			kvmi_journal_drop(journal, entry);
	}
}

/*
 * Called within kvm->srcu read side.  The range is inside one page; before has
 * room for what it holds.
 */
int kvmi_write_guest(struct kvm_introspection *kvmi, u64 gpa, const void *data,
		     size_t size, u16 flags, void *before)
{
	struct kvmi_journal *journal = &kvmi->journal;
	struct kvm_memory_slot *slot;
	unsigned long hva;
	bool writable;
	int err = 0;

	lockdep_assert_held(&kvmi->recv_lock);

	hva = kvmi_hva(kvmi->kvm, gpa, &slot, &writable);
	if (kvm_is_error_hva(hva) || !writable)
		return -KVM_ENOENT;

	/*
	 * kvm_write_guest_page() is for vCPUs: with a dirty ring, there would
	 * be no ring to log the page in.
	 */
	if (kvm_slot_dirty_track_enabled(slot) && !slot->dirty_bitmap)
		return -KVM_EOPNOTSUPP;

	mutex_lock(&journal->lock);

	/* UNHOOK may have come, and nothing may follow it */
	if (!kvmi_session_alive(atomic_read(&kvmi->session)))
		err = -KVM_EPERM;
	else if (__copy_from_user(before, (void __user *)hva, size))
		err = -KVM_ENOENT;
	else
		err = kvmi_journal_write(journal, gpa, before, data, size,
					 flags);
	if (!err && __copy_to_user((void __user *)hva, data, size))
		err = -KVM_ENOENT;
	if (err)
		kvmi_journal_not_written(journal, gpa, size);
	else
		kvmi_journal_written(journal, gpa, data, size, flags);

	mutex_unlock(&journal->lock);

	if (!err)
		kvmi_mark_dirty(slot, gpa);
	return err;
}

/*
 * The guest, which runs, may just be changing it.  Returns 1 if somebody has,
 * and -EFAULT if nobody can at the moment.
 */
static int kvmi_replace_byte(struct mm_struct *mm, unsigned long hva, u8 old,
			     u8 new)
{
	struct page *page;
	bool replaced;
	long pinned;
	u8 *ptr;

	if (mm == current->mm)
		return kvmi_arch_replace_byte((u8 __user *)hva, old, new);

	mmap_read_lock(mm);
	pinned = pin_user_pages_remote(mm, hva, 1, FOLL_WRITE, &page, NULL);
	mmap_read_unlock(mm);
	if (pinned != 1)
		return -EFAULT;

	ptr = kmap_local_page(page) + offset_in_page(hva);
	replaced = cmpxchg(ptr, old, new) == old;
	kunmap_local(ptr);
	unpin_user_pages_dirty_lock(&page, 1, replaced);
	return !replaced;
}

/* Returns false if the entry may be of use later on */
static bool kvmi_journal_restore_one(struct kvm_introspection *kvmi,
				     const struct kvmi_journal_entry *entry,
				     bool last)
{
	struct kvm *kvm = kvmi->kvm;
	struct kvm_memory_slot *slot;
	unsigned long hva;
	int err = -EFAULT;

	hva = kvmi_hva(kvm, entry->gpa, &slot, NULL);
	/* What the guest can only read may be writable for the VM's process */
	if (!kvm_is_error_hva(hva))
		err = kvmi_replace_byte(kvm->mm, hva, entry->written,
					entry->before);
	/*
	 * Slots are taken away and put back to change them, memory is short
	 * or protected for a moment, this thread is being killed.
	 */
	if (err < 0 && !last)
		return false;

	if (!err) {
		kvmi->journal.restored++;
		kvmi_mark_dirty(slot, entry->gpa);
	}
	trace_kvmi_restore(kvm, entry->gpa, entry->before, !err);
	return true;
}

/*
 * Whoever first finds that the session has ended does it, and the others wait:
 * the guest doesn't meet what the tool has left.  What can't be done then has
 * its last chance with UNHOOK, or the VM's end; a thread that has left its
 * process's memory already, as it dies, borrows it from those that haven't.
 * There is nothing to be done when the memory has gone.
 */
void kvmi_journal_restore(struct kvm_introspection *kvmi, bool last)
{
	struct kvmi_journal *journal = &kvmi->journal;
	struct kvmi_journal_entry *entry;
	struct hlist_node *next;
	struct mm_struct *mm;
	int i, idx;

	if (kvmi_session_alive(atomic_read(&kvmi->session)) ||
	    !READ_ONCE(journal->nr))
		return;

	mm = kvmi->kvm->mm;
	if (mm != current->mm && !mmget_not_zero(mm))
		return;

	idx = srcu_read_lock(&kvmi->kvm->srcu);
	mutex_lock(&journal->lock);
	/* Meanwhile UNHOOK may have done it, and another session have begun */
	for (i = 0; i < BIT(KVMI_JOURNAL_BITS) && journal->nr; i++) {
		if (kvmi_session_alive(atomic_read(&kvmi->session)))
			break;

		hlist_for_each_entry_safe(entry, next, &journal->heads[i],
					  node) {
			if (kvmi_journal_restore_one(kvmi, entry, last))
				kvmi_journal_drop(journal, entry);
			cond_resched();
		}
	}
	mutex_unlock(&journal->lock);
	srcu_read_unlock(&kvmi->kvm->srcu, idx);

	if (mm != current->mm)
		mmput_async(mm);
}

/* The VM is going away, with its memory */
void kvmi_journal_free(struct kvmi_journal *journal)
{
	struct kvmi_journal_entry *entry;
	struct hlist_node *next;
	int i;

	for (i = 0; journal->nr && i < BIT(KVMI_JOURNAL_BITS); i++)
		hlist_for_each_entry_safe(entry, next, &journal->heads[i],
					  node) {
			kvmi_journal_drop(journal, entry);
			cond_resched();
		}
	kvfree(journal->heads);
}
