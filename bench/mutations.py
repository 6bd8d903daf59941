"""The table of `mutants.py`: changes that tests must notice.

`old` must be in one file of the package, once; which file that is follows from it. `tests` are names
of tests, or of files of tests without `.py`: those that should notice, as few as will do.
A mutant with a `reason` is one that no test can notice.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """One change, what it breaks, and who should notice."""

    name: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    reason: str = ""


MUTANTS = (
    # --- writing: order, and what the disk has ---
    Mutant(
        "sums-as-finished",
        "for place in sorted(self.measured):",
        "for place in self.measured:",
        "sums depend on which thread was faster",
        ("test_sums_do_not_depend_on_who_was_faster",),
    ),
    Mutant(
        "rename-before-fsync",
        "        opened.output.sync()\n        opened.output.close()\n",
        "        rename(path, path.with_name(opened.shard.name))\n"
        "        opened.output.sync()\n        opened.output.close()\n"
        "        path = path.with_name(opened.shard.name)\n",
        "after a loss of power a weight file has its name and not its content",
        ("test_a_shard_is_on_disk_before_it_has_its_name",),
    ),
    Mutant(
        "shard-not-synced",
        "        opened.output.sync()\n        opened.output.close()\n",
        "        opened.output.close()\n",
        "weights are never waited for",
        ("test_a_shard_is_on_disk_before_it_has_its_name",),
    ),
    Mutant(
        "shard-name-not-synced",
        "            sync_folder(path.parent)\n            self.staging.add(shard)",
        "            self.staging.add(shard)",
        "the journal may note a file whose name is lost",
        ("test_a_name_is_on_disk_before_the_journal_notes_it",),
    ),
    Mutant(
        "journal-before-name",
        "            rename(path, path.with_name(shard.name))\n"
        "            sync_folder(path.parent)\n            self.staging.add(shard)",
        "            self.staging.add(shard)\n"
        "            rename(path, path.with_name(shard.name))\n            sync_folder(path.parent)",
        "the journal notes a file that has no name yet",
        ("test_a_name_is_on_disk_before_the_journal_notes_it",),
    ),
    Mutant(
        "journal-not-synced",
        "    with writing(path, len(data)):\n        system.fsync(descriptor)\n",
        "",
        "what was finished before a loss of power is done again",
        ("test_the_journal_is_on_disk_before_anything_else_happens",),
    ),
    Mutant(
        "side-files-not-synced",
        "        file.check()\n        out.sync()",
        "        file.check()",
        "after a loss of power a tokenizer is empty",
        ("test_every_file_and_folder_is_on_disk_before_the_output_has_its_name",),
    ),
    Mutant(
        "side-folders-not-synced",
        "    for path in sorted(made, reverse=True):\n        sync_folder(path)\n",
        "",
        "after a loss of power a file in a folder of its own is gone",
        ("test_every_file_and_folder_is_on_disk_before_the_output_has_its_name",),
    ),
    Mutant(
        "record-not-synced",
        "            offset += len(piece)\n        file.sync()",
        "            offset += len(piece)",
        "after a loss of power the record or the index is empty",
        ("test_every_file_and_folder_is_on_disk_before_the_output_has_its_name",),
    ),
    Mutant(
        "staging-not-synced",
        "        self.drop(self._journal.path.name)\n        sync_folder(self.folder)",
        "        self.drop(self._journal.path.name)",
        "after a loss of power the output has a journal, or lacks a file",
        (
            "test_names_that_are_not_synced_before_the_rename",
            "test_every_file_and_folder_is_on_disk_before_the_output_has_its_name",
        ),
    ),
    Mutant(
        "output-name-not-synced",
        "    sync_folder(target.parent)\n    if replaced is not None:",
        "    if replaced is not None:",
        "a run ends with success and its output's name is lost",
        ("test_the_output_has_its_name_on_disk_at_the_end",),
    ),
    Mutant(
        "new-journal-not-synced",
        "        staging.clear()\n        sync_folder(path)\n",
        "        staging.clear()\n",
        "after a loss of power there are files that no journal lists",
        ("test_a_new_journal_is_on_disk_before_the_first_shard_is_begun",),
    ),
    Mutant(
        "note-not-synced",
        "    sync_folder(target.parent)  # the note must be there if what is moved now is not\n",
        "",
        "after a loss of power nobody knows whose the old output is",
        ("test_what_is_moved_is_noted_on_disk_before",),
    ),
    Mutant(
        "journal-removed-first",
        "remove_listed(path, left.names, last=left.last)",
        'remove_listed(path, left.names, last="")',
        "a kill leaves files of an old plan that no journal lists",
        ("test_an_old_journal_goes_after_the_files_that_it_lists",),
    ),
    # --- writing: when something goes wrong ---
    Mutant(
        "forgotten-file-stays",
        "        self._journal.finished.pop(name, None)\n        self.drop(name)",
        "        self._journal.finished.pop(name, None)",
        "a damaged shard takes its room on the disk while it is written anew",
        ("test_a_damaged_shard_is_gone_before_it_is_written_again",),
    ),
    Mutant(
        "swap-not-undone",
        "        if replaced is not None and exists(old) and not exists(target):",
        "        if False:",
        "an error in --overwrite leaves nothing under the output's name",
        ("test_an_older_output_is_back_when_the_new_one_cannot_take_its_place",),
    ),
    Mutant(
        "output-not-free",
        "    if there:\n        check_replaceable(target, overwrite=overwrite)",
        "    if False:\n        check_replaceable(target, overwrite=overwrite)",
        "an output that appeared before the lock was held is found when all is written",
        ("test_an_output_that_appears_before_the_lock_is_held",),
    ),
    Mutant(
        "recover-over-others",
        "            elif there[1] == after:",
        "            elif True:",
        "what an interrupted run was replacing is removed though something else took its place",
        ("test_what_took_the_place_of_an_old_output_is_not_lost_either",),
    ),
    Mutant(
        "any-old-is-ours",
        "            if found[1] != before:",
        "            if False:",
        "a folder of somebody else is taken for the old output",
        ("test_something_of_a_user_where_the_old_output_is_kept",),
    ),
    Mutant(
        "what-came-meanwhile-is-kept",
        "            staging.check_content()\n",
        "",
        "a file of somebody else becomes part of an output",
        ("test_what_comes_into_the_staging_folder_meanwhile",),
    ),
    Mutant(
        "moved-is-not-looked-at",
        "            _check_is(replaced.inode, old, target)\n",
        "",
        "another folder than the old output is moved away and removed",
        ("test_the_output_is_swapped_before_the_first_rename",),
    ),
    Mutant(
        "staging-not-looked-at",
        "        if not self.is_at(self.folder):",
        "        if False:",
        "files in a folder of somebody else are taken for those of a run",
        ("test_the_staging_folder_is_swapped",),
    ),
    Mutant(
        "hard-links-are-ours",
        "    if not folder and found.st_nlink >",
        "    if False and found.st_nlink >",
        "a journal or lock is written through a second name",
        ("test_a_foreign_journal", "test_a_foreign_lock"),
    ),
    Mutant(
        "modes-do-not-count",
        "    if found.st_mode & _OTHERS_WRITE and found.st_mode & _OTHERS_WRITE & ~granted:",
        "    if False:",
        "a staging folder that others may write to is continued",
        ("test_a_staging_folder_that_others_may_write_to",),
    ),
    Mutant(
        "nothing-kept-on-write-errors",
        "(OutputError, ReadError, WriteError, HubError, MemoryError)",
        "(OutputError, ReadError, HubError, MemoryError)",
        "a full disk costs all that was finished",
        ("test_what_is_finished_is_kept_when_a_disk_fails",),
    ),
    Mutant(
        "background-errors-ignored",
        """self._stop.going():
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                self._stop.fail(error)""",
        """self._stop.going():
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                del error""",
        "a failed fsync is a success",
        ("test_what_is_finished_is_kept_when_a_disk_fails",),
    ),
    Mutant(
        "errors-of-senders-ignored",
        """                self._stop.fail(error)
            finally:
                self._room.release()""",
        """                del error
            finally:
                self._room.release()""",
        "a run goes on for hours after the disk is full",
        ("test_an_error_of_the_disk_is_told_by_sync",),
    ),
    Mutant(
        "sync-before-chunks-are-written",
        "            self._changed.wait_for(lambda: not self._sending)\n",
        "",
        "a shard is finished while some of it is on the way to the disk",
        ("test_pieces_in_any_order",),
    ),
    Mutant(
        "lost-pages-believed",
        "        if mapped.lost:\n            raise _gone(file, span)\n",
        "",
        "zeros in the place of what a file that shrank had",
        ("test_a_file_that_is_cut_off",),
    ),
    Mutant(
        "last-error-told",
        "self.error = self.error or error",
        "self.error = error",
        "the error that came first is hidden by those that follow from it",
        ("test_the_first_error_of_several_threads_is_raised",),
    ),
    Mutant(
        "space-not-looked-at",
        "if free is not None and free < shard.nbytes:",
        "if False:",
        "a disk that fills up is found in the middle of a shard",
        ("test_space_is_looked_at_again_before_each_shard",),
    ),
    Mutant(
        "short-writes-are-whole",
        '                raise OSError(errno.EIO, "nothing was written")\n        done += count',
        '                raise OSError(errno.EIO, "nothing was written")\n        done = len(data)',
        "zeros where a write was short",
        ("test_short_reads_and_writes",),
    ),
    # --- inputs ---
    Mutant(
        "inputs-never-compared",
        "            if now != file.stamp:\n                raise changed(path",
        "            if False:\n                raise changed(path",
        "an input that changes during a run makes an output of two states",
        ("test_whatever_a_merge_reads",),
    ),
    Mutant(
        "inputs-not-compared-when-opened-again",
        "        if file.stamp != first.stamp:",
        "        if False:",
        "what is opened twice may be two files",
        ("test_a_folder_that_is_another_one_for_a_moment",),
    ),
    Mutant(
        "inputs-checked-too-late",
        "progress, told, started)\n        inputs.end()\n",
        "progress, told, started)\n",
        "an output of changed inputs has its name before that is found",
        ("test_whenever_it_happens", "test_a_side_file_that_grows_while_it_is_copied"),
    ),
    Mutant(
        "changed-inputs-are-continued",
        "    passing = passing and not isinstance(error, (ChangedError, WrongDigestError))\n",
        "    passing = passing and not isinstance(error, WrongDigestError)\n",
        "what is finished of inputs that have changed is kept",
        ("test_what_an_earlier_run_has_finished_goes_too",),
    ),
    Mutant(
        "shards-of-changed-inputs-noted",
        "            self.inputs.check()  # only what is of unchanged inputs may be continued later",
        "            pass",
        "the journal notes a shard that was made of a changed input",
        ("test_no_shard_counts_as_finished_after_a_change",),
    ),
    Mutant(
        "early-end-ignored",
        "if done < len(out) and offset + done < self.nbytes:",
        "if False:",
        "zeros where a file ends too early",
        ("test_a_read_that_ends_early_says_where",),
    ),
    Mutant(
        "pipes-are-files",
        "if not stat.S_ISREG(mode):",
        "if stat.S_ISDIR(mode):",
        "a pipe or a device is read as if it had a length",
        ("test_what_is_no_regular_file_is_never_read",),
    ),
    # --- continuing ---
    Mutant(
        "journal-lines-not-checked",
        'return line.endswith(b"\\n") and digest == _digest(text)',
        'return line.endswith(b"\\n")',
        "a damaged line of the journal is believed",
        ("test_a_damaged_line_ends_the_journal",),
    ),
    Mutant(
        "journal-begins-anew",
        "            self._good += len(line)\n",
        "",
        "a run that continues overwrites the journal from its beginning",
        ("test_garbage_after_the_journal_hides_nothing",),
    ),
    Mutant(
        "tensors-believed",
        "right = tensor_digest(written, work, check=stop.check) == expected",
        "right = bool(tensor_digest(written, work, check=stop.check))",
        "damaged weights of an interrupted run are kept",
        ("test_what_is_damaged_is_written_again",),
    ),
    Mutant(
        "headers-believed",
        "return file.nbytes == shard.nbytes and file.read(0, len(header)) == header",
        "return file.nbytes == shard.nbytes",
        "a damaged header of an interrupted run is kept",
        ("test_what_is_damaged_is_written_again",),
    ),
    Mutant(
        "times-of-inputs-ignored",
        "changed = [file.stamp.mtime_ns, file.stamp.ctime_ns]",
        "changed = None",
        "a run continues though a large base was written to",
        ("test_large_inputs_are_told_by_their_times_too",),
    ),
    Mutant(
        "last-sample-short",
        "offset = header + (last - header) * number // (SAMPLES - 1)",
        "offset = header + (last - header) * number // SAMPLES",
        "the end of a large base is never looked at",
        ("test_the_samples_reach_from_the_first_byte_to_the_last",),
    ),
    Mutant(
        "recipe-without-places",
        'self._texts.append(f"Stored {number} {value.offset} {value.shape} {value.dtype}")',
        'self._texts.append(f"Stored {number} {value.shape} {value.dtype}")',
        "a run continues though tensors come from other places of the same file",
        ("test_the_place_of_a_tensor_is_part_of_the_plan",),
    ),
    # --- locks ---
    Mutant(
        "lock-without-name",
        "            if _is_named(path, descriptor):\n                lock =",
        "            if True:\n                lock =",
        "two runs hold locks, one of them of a file that is gone",
        ("test_a_lock_whose_file_was_removed_is_taken_again",),
    ),
    Mutant(
        "dead-hold-locks",
        "return not _alive(_record(_content(descriptor, path)))",
        "return not _record(_content(descriptor, path))",
        "where a disk knows no locks, a killed run blocks the next",
        ("test_where_a_disk_knows_no_locks_the_record_decides",),
    ),
    Mutant(
        "lock-before-reboot",
        'record["boot"] == _boot() and psutil',
        "psutil",
        "a process that got the number of a killed one holds its lock",
        ("test_where_a_disk_knows_no_locks_the_record_decides",),
    ),
    Mutant(
        "lock-left",
        "            if self.moved is None and _is_named(self.path, self._descriptor):",
        "            if False:",
        "a lock file stays beside every output",
        ("test_threads_of_one_process_exclude_each_other",),
    ),
    # --- verifying ---
    Mutant(
        "record-not-compared",
        "if whole != _KEY + digest.hexdigest().encode() + _TAIL:",
        "if not whole.endswith(_TAIL):",
        "a changed record is believed",
        ("test_a_record_in_which_any_byte_was_changed", "test_damage_is_named"),
    ),
    Mutant(
        "verify-other-sizes",
        "        if nbytes != record.nbytes:",
        "        if False:",
        "a weight file with something appended is right",
        ("test_damage_is_named",),
    ),
    Mutant(
        "verify-outside",
        'if path.is_absolute() or ".." in path.parts or',
        "if path.is_absolute() or",
        "a record makes verify read files outside of the folder",
        ("test_names_that_lead_elsewhere_are_not_followed",),
    ),
    Mutant(
        "verify-ignores-what-was-added",
        "            extra.append(name)\n            problem = harm(entry)\n",
        "            extra.append(name)\n            problem = None\n",
        "a module or weight file that somebody added is right",
        ("test_code_and_weights_that_were_added",),
    ),
    Mutant(
        "verify-headers",
        "    digest.update(header)\n    digest.update(digests)\n",
        "    digest.update(digests)\n",
        "changed metadata is right",
        ("test_damage_is_named", "test_digests_are_those_of_what_safetensors_loads"),
    ),
    Mutant(
        "verify-finite",
        '"F8_E4M3": _Dtype(8, None, ("uint8", 0x7F, 0x7F)),',
        '"F8_E4M3": _Dtype(8, None, ("uint8", 0x7F, 0x7E)),',
        "NaNs in 8 bits are not seen",
        ("test_the_count_is_that_of_torch",),
    ),
    # --- arithmetic ---
    Mutant(
        "ties-up",
        "    np.bitwise_and(shifted, _ONE, out=shifted)\n",
        "    np.copyto(shifted, _ONE)\n",
        "ties are rounded up",
        ("test_narrowing_rounds_to_nearest_even",),
    ),
    Mutant(
        "ties-up-in-c",
        "            up = more > 0 || (more == 0 && (whole & 1));",
        "            up = more >= 0;",
        "the compiled kernels round ties up",
        ("test_ties_and_what_is_beside_them",),
    ),
    Mutant(
        "ties-up-in-integers",
        "half and (more or size & 1 == 1))",
        "half)",
        "exact integers round ties up",
        ("test_rounding_of_integers_is_that_of_fractions",),
    ),
    Mutant(
        "all-is-proven",
        "    return ~proven;\n}\n\n/* The like from fp64",
        "    return 0;\n}\n\n/* The like from fp64",
        "what fp32 does not prove is taken for right",
        ("test_ordinary_inputs",),
    ),
    Mutant(
        "one-scale-in-c",
        "job->by_row ? job->factor[row] : 1.0",
        "job->by_row ? job->factor[0] : 1.0",
        "every row gets DoRA's scale of the first",
        ("test_dora",),
    ),
    Mutant(
        "negative-zero",
        "return base if base == 0 and not adds else 0.0",
        "return 0.0",
        "a -0 of the base that nothing is added to is lost",
        ("test_zeros",),
    ),
    Mutant(
        "weight-rounded",
        "return dyadic(self.scale).times(dyadic(self.weight))",
        "return dyadic(self.scale * self.weight)",
        "the product of weight and scale is rounded",
        ("test_weight_and_scale_are_multiplied_exactly",),
    ),
    Mutant(
        "open-without-sum",
        "scaled = m.times(value)",
        "scaled = m",
        "DoRA's exact numbers forget the sum",
        ("test_dora_that_ties",),
    ),
    Mutant(
        "window-from-zero",
        "return replace(self, start=self.start + start, stop=self.start + stop)",
        "return replace(self, start=start, stop=stop)",
        "a window of a window gets the update of other rows",
        ("test_update_of_a_join_is_the_join_of_updates", "test_some_parts_into_fused_tensors"),
    ),
    Mutant(
        "factors-kept-too-long",
        "        self.work.forget()\n",
        "",
        "the factors of all tensors stay in memory",
        ("test_factors_are_kept_for_one_tensor_only",),
    ),
    Mutant(
        "distance-at-one-place",
        "offset = reference.offset + self.measured * bits // own_bits",
        "offset = reference.offset",
        "distances are from the first block of the reference, again and again",
        ("test_a_tied_reference",),
    ),
    Mutant(
        "equal-nan-is-nan",
        "return 0.0 if math.isnan(squared) and np.array_equal(one, other) else squared",
        "return squared",
        "a base with a NaN that is only copied is at distance NaN",
        ("test_equal_blocks_are_at_distance_zero",),
    ),
    # --- names and layouts ---
    Mutant(
        "parts-of-experts-swapped",
        '(rows if match["part"] == "up" else 0)',
        '(rows if match["part"] == "gate" else 0)',
        "updates of gate and up change places in fused experts",
        ("test_single_experts_into_fused_ones",),
    ),
    Mutant(
        "overlap-allowed",
        "        if target == other_target and start < stop:",
        "        if False:",
        "one weight gets the updates of two spellings",
        ("test_a_part_twice",),
    ),
    Mutant(
        "first-fit-taken",
        "        if len(found) > 1:\n            examples",
        "        if False:\n            examples",
        "names that fit in two ways are taken in the first",
        ("test_names_that_fit_in_two_ways_are_refused",),
    ),
    Mutant(
        "pieces-as-whole",
        "whole = len(back) == 1 and sum(p.target == piece.target for p in found) == 1",
        "whole = True",
        "an update of q is refused where the base has qkv",
        ("test_some_parts_into_fused_tensors",),
    ),
    Mutant(
        "twice-allowed",
        "        twice = next((key for key in new if key in out), None)\n",
        "        twice = None\n",
        "of experts that are there twice one is taken",
        ("test_experts_packed_and_single_are_refused",),
    ),
    Mutant(
        "groups-in-order",
        'groups = dims.kv_heads or 1 if rule.op == "grouped" else 1',
        "groups = 1",
        "InternLM2's wqkv is taken apart as if it were joined",
        ("test_grouped_rows_of_a_small_model",),
    ),
    Mutant(
        "kinds-not-compared",
        "        if _kind(tensor) != first:",
        "        if False:",
        "q, k and v of different dtypes are joined",
        ("test_shapes_and_dtypes_that_do_not_fit_when_joined",),
    ),
    Mutant(
        "neighbours-of-other-files",
        "            and last.path == part.path\n",
        "",
        "bytes after a tensor are taken for those of another file",
        ("test_the_same_place_in_another_file_is_no_neighbour",),
    ),
    Mutant(
        "end-of-file-counts-one-less",
        "and last.offset + last.nbytes == part.offset",
        "and last.offset + last.nbytes <= part.offset",
        "what lies between two tensors becomes part of them",
        (
            "test_adjacent_rows_are_one_tensor_again",
            "test_nested_joins_are_flat",
            "test_fused_and_split_again",
        ),
    ),
    # --- places ---
    Mutant(
        "links-are-written-through",
        "    if is_link(target):",
        "    if False:",
        "an output is written through a link",
        ("test_an_output_that_is_a_link",),
    ),
    Mutant(
        "inputs-by-name-only",
        "candidate == folder or same(candidate, there)",
        "candidate == folder",
        "an input is written into under its other name",
        ("test_an_input_under_another_name",),
    ),
    Mutant(
        "budget-not-kept",
        "        if one > max_memory:",
        "        if False:",
        "--max-memory is not kept",
        ("test_a_budget_too_small_for_one_worker",),
    ),
    Mutant(
        "nothing-changed-is-success",
        "    if made.must_change and not any(any(found.squared) for found in finished):",
        "    if False:",
        "updates that are lost in rounding are a success",
        ("test_updates_that_cancel_are_an_error",),
    ),
    # --- parts of an output, and clusters ---
    Mutant(
        "parts-by-count",
        "heapq.heapreplace(loads, (load + shards[place].nbytes, part))",
        "heapq.heapreplace(loads, (load + 1, part))",
        "parts have the same number of files, and not of bytes",
        ("test_shards_are_divided_by_bytes",),
    ),
    Mutant(
        "record-of-others",
        'return record if isinstance(record, dict) and record.get("of") == digest else None',
        "return record",
        "the record of another plan counts as one of this",
        ("test_the_record_of_another_plan",),
    ),
    Mutant(
        "record-without-file",
        "            return system.lstat(path).st_size == record.nbytes\n        return False",
        "            return system.lstat(path).st_size == record.nbytes\n        return True",
        "a record counts though its file is gone",
        ("test_damage_is_noticed",),
    ),
    Mutant(
        "plans-not-compared",
        "found = differences(there.identity, shared.identity)",
        "found: list[str] = []",
        "parts of different inputs and options are put together",
        ("test_another_plan", "test_another_input"),
    ),
    Mutant(
        "finish-at-once",
        "missing = [s.name for s in self.made.shards if s.name not in self._finished]",
        "missing: list[str] = []",
        "what completes an output does not demand all parts",
        ("test_finish_before_all_are_there",),
    ),
    Mutant(
        "part-broken-is-done",
        "            if not broken and output.is_done():",
        "            if output.is_done():",
        "a part whose disk failed is a success",
        ("test_a_part_whose_sync_fails_is_no_success",),
    ),
    Mutant(
        "moved-parts",
        "        if inode_of(self.folder) != self._inode:",
        "        if False:",
        "a part notes what it has finished in a folder that was put in the place of its own",
        ("test_the_folder_is_put_elsewhere",),
    ),
    Mutant(
        "late-workers-believed",
        """    other = described(environment(), expected)
    if other:
        raise ClusterError(""",
        """    other = described(environment(), expected)
    if False:
        raise ClusterError(""",
        "a worker of another version that comes late writes shards",
        ("test_another_worker_that_comes_late",),
    ),
)
