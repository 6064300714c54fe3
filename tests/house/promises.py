"""Which test shows which promise: the rows of the table of faults, and what users of other notebooks complain about.

Each row holds the details that are promised, each detail the tests that inject the fault for real: a signal to a
process, a wire that is cut or goes dead, a full disk, flipped bits. `test_promises` checks that every test is there.
"""

from __future__ import annotations

STOP, FAILURES, HANG = "test_world_stop", "test_world_failures", "test_hang_report"
KEPT = f"{STOP}::test_stop_ends_the_cell_and_keeps_the_variables"
TAKEOVER = "test_takeover"
DASK = "test_dask_killed::test_a_run_survives_partitions_a_killed_nanny_and_a_killed_scheduler"
SHARED = "test_devices_shared::test_two_notebooks_share_devices_and_a_run_outlives_the_server_that_started_it"
SECRETS = "test_secrets::test_nobody_else_can_connect_read_or_overhear"

PROMISES: dict[str, dict[str, list[str]]] = {
    "Stop during a cell": {
        "in Python, sleep, a subprocess, an await, a flood of output: 2 s, variables kept": [KEPT],
        "in all_reduce, barrier, recv, a group of some ranks, backward: 2 s, variables kept": [KEPT],
        "in a DataLoader with workers, which end": [
            f"{STOP}::test_stop_in_a_loader_with_workers",
            f"{STOP}::test_a_stopped_loader_with_workers_lets_go_of_them",
        ],
        "in training: all ranks after the same step, the group stays": [
            f"{STOP}::test_stop_in_training_ends_all_ranks_after_the_same_step",
            f"{STOP}::test_stop_between_two_optimizers_of_a_step_lets_the_second_step_too",
        ],
        "in a checkpoint: 2 s, the one before loads": [
            f"{STOP}::test_stop_during_a_checkpoint_keeps_the_variables_and_what_was_saved_before"
        ],
        "8 s at worst, and what was lost is said": [
            f"{STOP}::test_a_loop_that_swallows_the_interrupt_ends_all_the_same_and_keeps_its_variables",
            f"{STOP}::test_stop_of_a_cell_in_c_code_that_ignores_signals_kills_only_that_rank",
        ],
        "a second press goes to the next rung": [f"{STOP}::test_pressing_again_ends_sooner"],
        "next cell works": [f"{STOP}::test_stop_again_and_again_never_breaks_the_world"],
        "from the notebook": [
            "test_distribute_notebook::test_stop_in_the_notebook_ends_the_cell_and_keeps_everything",
            "test_runs_outlive::test_stop_of_the_notebook_keeps_the_variables_of_the_kernel_and_of_the_ranks",
        ],
        "from the widget": [
            "test_cell_live_view::test_a_chart_grows_while_the_cell_runs_and_stop_leaves_a_static_view"
        ],
        "from %runs stop": [SHARED],
        "while it waits for its turn, or for slots": [
            f"{STOP}::test_a_queued_run_can_be_stopped_before_it_begins",
            SHARED,
        ],
        "over a wire that has broken": [
            "test_broken_wire::test_stop_is_obeyed_over_a_wire_that_was_mended_and_answered_when_it_is_not"
        ],
    },
    "one rank raises": {
        "in 2 s, named with rank, line, error; all variables kept; next cell works": [
            f"{FAILURES}::test_peers_of_a_failed_rank_are_let_go",
            f"{FAILURES}::test_a_rank_of_four_fails_while_three_wait",
            "test_distribute_notebook::test_an_error_is_drawn_with_the_notebooks_lines_and_the_rank",
        ],
        "the culprit first, echoes of peers folded": [
            f"{FAILURES}::test_every_error_is_told_the_culprits_first",
            f"{FAILURES}::test_a_swallowed_error_of_a_peer_does_not_hide_the_culprit",
        ],
    },
    "kill -9 of a rank": {
        "noticed in 1 s, survivors released in 2 s, replaced in 5 s": [
            f"{FAILURES}::test_a_rank_killed_from_outside_is_noticed_its_peers_released_and_its_place_taken_in_time"
        ],
        "a segfault, an abort, an exit: each as itself": [f"{FAILURES}::test_a_rank_that_dies_is_named_and_replaced"],
        "what it had started ends with it": [
            f"{FAILURES}::test_what_a_killed_rank_had_started_ends_with_it",
            f"{FAILURES}::test_nothing_outlives_a_killed_zygote_nor_then_a_killed_agent",
        ],
        "resumed with the same weights": [
            "test_resume::test_the_final_state_is_that_of_an_undisturbed_run_to_the_last_bit"
        ],
    },
    "an agent or its host is lost": {
        "a follower's: resumed with the same weights, one copy": [
            "test_world_partition::test_a_run_that_loses_its_following_agent_goes_on_where_there_is_room",
            "test_world_two_hosts::test_a_run_whose_host_falls_silent_goes_on_on_another_to_the_same_weights",
        ],
        "the leader's: resumed under another one with the same weights, one copy": [
            f"{TAKEOVER}::test_a_follower_goes_on_with_the_run_of_a_lost_leader_to_the_same_weights",
            f"{TAKEOVER}::test_an_agent_without_any_rank_stands_by_for_a_run_that_is_all_on_one_host",
            f"{TAKEOVER}::test_the_agent_that_takes_a_killed_ones_place_goes_on_with_its_run",
            f"{TAKEOVER}::test_a_leader_that_stands_still_has_no_rank_left_when_another_one_leads",
            f"{TAKEOVER}::test_a_leader_cut_off_from_its_follower_goes_on_itself_and_the_follower_does_not",
            "test_world_two_hosts::test_a_run_whose_leading_host_falls_silent_goes_on_under_another_to_the_same_weights",
        ],
        "the notebook follows it, and Stop stops it": [
            "test_takeover_notebook"
            "::test_a_cell_goes_on_when_its_agent_is_killed_and_stop_and_a_background_run_work_likewise",
            f"{TAKEOVER}::test_a_stop_between_two_leaders_is_heard_by_the_second",
        ],
        "without restarts, or with none left, it is told as lost": [
            "test_agent_killed::test_a_run_of_a_killed_agent_is_lost_for_good_and_a_new_agent_takes_the_place",
            f"{TAKEOVER}::test_a_run_that_has_used_up_its_restarts_is_lost_with_its_leader",
        ],
    },
    "hang": {
        "a stopped rank": [f"{HANG}::test_a_stopped_process_is_reported_and_then_its_recovery"],
        "a skipped collective": [f"{HANG}::test_a_rank_that_skipped_a_collective_is_named"],
        "a slow rank, with its line and what the others wait in": [
            f"{HANG}::test_a_rank_that_sleeps_while_the_others_reduce_is_named_with_its_line"
        ],
        "no false alarm": [
            f"{HANG}::test_what_all_ranks_do_and_what_one_visibly_does_is_no_hang",
            f"{HANG}::test_an_evaluation_known_by_its_name_is_no_hang_while_it_works",
            f"{HANG}::test_an_evaluation_without_gradients_is_no_hang_while_it_works",
            f"{HANG}::test_a_checkpoint_of_one_rank_is_no_hang_while_it_works",
        ],
    },
    "Dask worker, nanny or scheduler killed": {
        "ranks train on, control is back in 30 s, one copy: a cluster of our own": [
            "test_clusters::test_a_killed_worker_leaves_its_ranks_training_and_the_next_one_adopts_them",
            "test_scheduler_killed::test_ranks_outlive_the_scheduler_and_control_is_back",
        ],
        "the same: a cluster that others have started, worker, nanny and scheduler": [DASK],
        "the network is gone for a while": [
            DASK,
            "test_broken_wire::test_a_wire_that_is_cut_again_and_again_loses_nothing_and_repeats_nothing",
            "test_broken_wire::test_a_wire_that_is_dead_for_a_while_and_then_cut_shows_the_end_that_was_missed",
        ],
    },
    "kernel killed or restarted, browser closed, jupyter-server restarted": {
        "a killed kernel": [
            "test_runs_outlive::test_a_run_survives_its_killed_kernel_and_another_kernel_shows_all_of_it"
        ],
        "a restarted kernel finds its ranks": [SHARED],
        "a closed browser": [
            "test_complaints::test_output_of_a_cell_whose_browser_was_closed_is_shown_again_in_order_and_once"
        ],
        "a killed jupyter-server": [SHARED],
    },
    "checkpoints": {
        "a crash at every write": ["test_checkpoints::test_a_crash_at_every_write_leaves_a_checkpoint_that_loads"],
        "flipped bits": [
            "test_checkpoints::test_a_flipped_bit_anywhere_is_noticed_and_the_one_before_is_taken",
            "test_resume::test_a_corrupt_checkpoint_is_skipped_with_a_word_when_the_run_goes_on",
        ],
        "a full disk": [
            "test_full_disk::test_a_run_whose_disk_fills_up_trains_on_says_so_and_its_end_is_on_disk",
            "test_full_disk::test_a_disk_that_is_full_when_a_cell_was_sent_does_not_keep_it_from_running",
            "test_full_disk::test_a_place_where_no_folder_can_be_made_refuses_the_cell_and_nothing_runs",
        ],
    },
    "two worlds want the same devices": {
        "the second waits, says why, and gets them": [SHARED],
        "resources come back after a Stop, a crash of the kernel, the end of a lease": [
            SHARED,
            "test_world_life::test_a_world_gives_its_slots_back",
            "test_world_life::test_a_world_without_an_owner_ends_with_its_lease",
        ],
        "all or nothing": ["test_world_life::test_more_ranks_than_slots_are_refused_and_nothing_is_held"],
    },
    "security": {
        "nothing listens beyond this machine; sockets are closed to others; no secret is shown or stored": [SECRETS],
        "the tests see what they look for": ["test_secrets::test_the_spy_sees_what_is_there"],
        "Dask's parts ask for a certificate": ["test_clusters::test_a_client_without_the_certificate_is_turned_away"],
    },
}

COMPLAINTS: dict[str, list[str]] = {
    "notebook frozen when one rank fails before a barrier (ipyparallel#435)": [
        f"{FAILURES}::test_peers_of_a_failed_rank_are_let_go"
    ],
    "Stop kills all workers and models (nbdistributed)": [
        "test_runs_outlive::test_stop_of_the_notebook_keeps_the_variables_of_the_kernel_and_of_the_ranks"
    ],
    "CUDA already initialised (accelerate#182 to #3925)": [
        "test_complaints::test_a_notebook_that_has_used_torch_its_devices_and_a_process_group_can_distribute"
    ],
    "output lost when the browser closes (jupyterlab#4237)": [
        "test_complaints::test_output_of_a_cell_whose_browser_was_closed_is_shown_again_in_order_and_once"
    ],
    "client lost after a kernel restart (dask-labextension#84)": [SHARED],
    "dead engine does not come back (ipyparallel#706)": [
        "test_distribute_notebook::test_a_killed_rank_is_named_and_the_next_cell_says_what_is_missing"
    ],
    "wrong line numbers (ipyparallel#661)": [
        "test_distribute_notebook::test_an_error_is_drawn_with_the_notebooks_lines_and_the_rank"
    ],
    "rank frozen because nobody reads its stderr pipe (nbdistributed)": [
        "test_complaints::test_a_rank_whose_messages_nobody_reads_goes_on",
        "test_world_output::test_a_cell_ends_while_nobody_reads",
    ],
    "large return value blocks (Lightning)": [
        "test_complaints::test_a_large_value_comes_back_and_a_large_result_is_no_burden"
    ],
    "resources held after Stop (ray#24947)": [
        f"{STOP}::test_what_a_stopped_cell_has_started_ends_with_it",
        f"{STOP}::test_a_stopped_loader_with_workers_lets_go_of_them",
        SHARED,
    ],
    "notebook variables overwritten by fakes (nbdistributed)": [
        "test_complaints::test_variables_of_the_notebook_are_never_overwritten_by_those_of_the_ranks"
    ],
}
