// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * A kernel module that converts pages between private and shared on all CPUs at once, for some seconds, and counts what it
 * did and what was lost. Loading it does all of it; its pages stay as they are at the end.
 *
 * It relies on a page being all zeroes after each conversion, which is so under pagegate but not under real SEV.
 */
#include <linux/cpumask.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/set_memory.h>
#include <linux/sched.h>
#include <linux/vmalloc.h>

#define ORDER 4 /* Of a worker's own pages. */
#define OWN (1 << ORDER)
#define WORDS (PAGE_SIZE / sizeof(u64))
#define MOST_WORKERS 8
#define SWEEPS 8 /* Over all common pages, in a round. */

static unsigned int seconds = 10;
module_param(seconds, uint, 0444);
MODULE_PARM_DESC(seconds, "how long to convert");

/* A page with a further mapping, through which it is seen shared. */
struct seen_twice {
	u64 *private;
	u64 *shared;
};

struct worker {
	unsigned int cpu;
	struct task_struct *task;
	/* Neighbouring pages, which only this worker converts and touches. */
	u64 *own;
	u64 seed[OWN]; /* What all words of the page are. */
	bool decrypted[OWN];
	/* A page that only this worker touches, without asking for conversions. */
	struct seen_twice apart;
	/* A page for which only this worker asks, but which all touch at any time. */
	struct seen_twice common;

	u64 asked; /* Pages for which a conversion was asked, by one hypercall each. */
	u64 failed; /* Of these, those for which Linux returned an error. */
	u64 touched; /* Accesses to a page in the wrong state, each of which has to convert it. */
	u64 contended; /* Accesses to common pages. */
	u64 lost; /* Words that were not what they had to be. */
};

static struct worker workers[MOST_WORKERS];
static unsigned int worker_count;
static unsigned long deadline;

static void fill(u64 *page, u64 value)
{
	for (unsigned int i = 0; i < WORDS; i++)
		WRITE_ONCE(page[i], value);
}

static void check(struct worker *worker, const u64 *page, u64 value)
{
	for (unsigned int i = 0; i < WORDS; i++)
		worker->lost += READ_ONCE(page[i]) != value;
}

static void ask(struct worker *worker, u64 *page, bool decrypt)
{
	unsigned long at = (unsigned long)page;

	worker->asked++;
	if (decrypt ? set_memory_decrypted(at, 1) : set_memory_encrypted(at, 1))
		worker->failed++;
}

/* Its own pages: each keeps its bytes while its neighbours are converted. */
static void convert_own(struct worker *worker, u64 round)
{
	unsigned int i = round % OWN;
	u64 *page = worker->own + i * WORDS;

	check(worker, page, worker->seed[i]);
	worker->decrypted[i] = !worker->decrypted[i];
	ask(worker, page, worker->decrypted[i]);
	check(worker, page, 0);
	worker->seed[i] = round * 2 + 1;
	fill(page, worker->seed[i]);
}

static void touch_apart(struct worker *worker, u64 round)
{
	struct seen_twice *page = &worker->apart;

	fill(page->private, ~round);
	check(worker, page->shared, 0);
	fill(page->shared, round);
	check(worker, page->shared, round);
	check(worker, page->private, 0);
	worker->touched += 2;
}

/* The other workers touch the page while this one asks for its conversion, and the other way round. */
static void convert_common(struct worker *worker, u64 round)
{
	ask(worker, worker->common.private, !(round % 2));
	for (unsigned int i = 0; i < worker_count * SWEEPS; i++) {
		struct seen_twice *page = &workers[i % worker_count].common;

		WRITE_ONCE(page->private[worker->cpu], round);
		READ_ONCE(page->shared[worker->cpu]);
		worker->contended += 2;
	}
}

static int work(void *argument)
{
	struct worker *worker = argument;

	/* An even number of rounds, after which the common page is private again. */
	for (u64 round = 0; round % 2 || time_before(jiffies, deadline); round++) {
		convert_own(worker, round);
		touch_apart(worker, round);
		convert_common(worker, round);
		cond_resched();
	}
	/* It must not end by itself, because kthread_stop() needs it. */
	while (!kthread_should_stop())
		schedule_timeout_interruptible(1);
	return 0;
}

static int see_twice(struct seen_twice *seen)
{
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);

	if (!page)
		return -ENOMEM;
	seen->private = page_address(page);
	seen->shared = vmap(&page, 1, VM_MAP, pgprot_decrypted(PAGE_KERNEL));
	return seen->shared ? 0 : -ENOMEM;
}

static int __init convert_init(void)
{
	struct worker all = {};
	unsigned int cpu;

	/* What is allocated is not freed if this fails: then the guest's run has failed. */
	for_each_online_cpu(cpu) {
		struct worker *worker = &workers[worker_count];

		if (worker_count == MOST_WORKERS)
			break;
		worker->cpu = cpu;
		worker->own = (u64 *)__get_free_pages(GFP_KERNEL | __GFP_ZERO, ORDER);
		if (!worker->own || see_twice(&worker->apart) || see_twice(&worker->common))
			return -ENOMEM;
		worker->task = kthread_create(work, worker, "convert/%u", cpu);
		if (IS_ERR(worker->task))
			return PTR_ERR(worker->task);
		kthread_bind(worker->task, cpu);
		worker_count++;
	}

	deadline = jiffies + seconds * HZ;
	for (unsigned int i = 0; i < worker_count; i++)
		wake_up_process(workers[i].task);
	schedule_timeout_uninterruptible(seconds * HZ);
	for (unsigned int i = 0; i < worker_count; i++)
		kthread_stop(workers[i].task);

	for (unsigned int i = 0; i < worker_count; i++) {
		struct worker *worker = &workers[i];

		for (unsigned int page = 0; page < OWN; page++)
			check(worker, worker->own + page * WORDS, worker->seed[page]);
		/* Through its private mapping last, so that it is private as the page tables say. */
		vunmap(worker->apart.shared);
		vunmap(worker->common.shared);
		WRITE_ONCE(worker->common.private[0], 0);
		all.asked += worker->asked;
		all.failed += worker->failed;
		all.touched += worker->touched;
		all.contended += worker->contended;
		all.lost += worker->lost;
	}
	pr_info("workers=%u asked=%llu failed=%llu touched=%llu contended=%llu lost=%llu\n", worker_count, all.asked,
		all.failed, all.touched, all.contended, all.lost);
	return 0;
}
module_init(convert_init);

MODULE_DESCRIPTION("Converts pages between private and shared on all CPUs at once");
MODULE_LICENSE("Dual MIT/GPL");
