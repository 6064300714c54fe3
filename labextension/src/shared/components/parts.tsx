// Small pieces that every panel is made of.
import type { ComponentChildren } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';

import { copyText } from '../clipboard';
import { serverNow } from '../clock';
import { useQuestion } from '../focus';
import type { TopicState } from '../stores/topic-store';
import { useTrans } from '../translation';

/** A state as a word with a dot; both say the same, so that no colour is needed to read it. */
export function StateWord({ state, title }: { state: string; title?: string }) {
  const [word = ''] = state.split(/[ ,:]/);
  return (
    <span class="llmc-stateword" data-state={word} title={title}>
      <span class="llmc-stateword-dot" aria-hidden="true" />
      {state}
    </span>
  );
}

/** A share of something as a bar, with what it is in words. `runsOut`: where all of it is used, something fails. */
export function Meter(props: { label: string; value: number; max: number; text: string; runsOut?: boolean }) {
  const { label, value, max, text, runsOut = false } = props;
  const share = max > 0 ? Math.min(1, Math.max(0, value / max)) : 0;
  return (
    <span class="llmc-meter" data-level={runsOut && share > 0.92 ? 'full' : 'fine'}>
      <span class="llmc-meter-label">{label}</span>
      <span
        class="llmc-meter-track"
        role="meter"
        aria-label={label}
        aria-valuemin={0}
        aria-valuemax={100}
        aria-valuenow={Math.round(100 * share)}
        aria-valuetext={text}
      >
        <span class="llmc-meter-fill" style={{ width: `${100 * share}%` }} />
      </span>
      <span class="llmc-meter-text">{text}</span>
    </span>
  );
}

/** What went wrong, where it went wrong. Empty for nothing. */
export function Problem({ text, again }: { text: string; again?: () => void }) {
  const trans = useTrans();
  if (!text) {
    return null;
  }
  return (
    <p class="llmc-problem" role="alert">
      {text}
      {again && (
        <button type="button" class="llmc-button" onClick={again}>
          {trans.__('Try again')}
        </button>
      )}
    </p>
  );
}

/** A note above a list: why it may be old, that it is on its way, or what an empty one means. */
export function ListNote<T>({ state, empty, retry }: { state: TopicState<T>; empty: ComponentChildren; retry: () => void }) {
  const trans = useTrans();
  if (state.problem) {
    return <Problem text={state.problem} again={retry} />;
  }
  if (!state.isLoaded) {
    return <p class="llmc-note">{trans.__('Asking the server …')}</p>;
  }
  return state.items.length ? null : <p class="llmc-note">{empty}</p>;
}

/** An action that takes a while: its button says so, and what was refused stands beside it. */
export interface Action {
  readonly isBusy: boolean;
  readonly problem: string;
  run(): Promise<void>;
}

export function useAction(work: () => Promise<unknown>): Action {
  const [isBusy, setBusy] = useState(false);
  const [problem, setProblem] = useState('');
  const isShown = useRef(true);
  useEffect(() => {
    isShown.current = true;
    return () => {
      isShown.current = false;
    };
  }, []);
  const run = async () => {
    setBusy(true);
    setProblem('');
    try {
      await work();
    } catch (error) {
      if (isShown.current) {
        setProblem(error instanceof Error ? error.message : String(error));
      }
    } finally {
      if (isShown.current) {
        setBusy(false);
      }
    }
  };
  return { isBusy, problem, run };
}

/** A button that copies a text, and says that it did. */
export function CopyButton({ text, label, name }: { text: string; label?: string; name?: string }) {
  const trans = useTrans();
  const [said, setSaid] = useState('');
  useEffect(() => {
    const timer = said ? window.setTimeout(() => setSaid(''), 2000) : 0;
    return () => window.clearTimeout(timer);
  }, [said]);
  const copy = () =>
    copyText(text).then(
      () => setSaid(trans.__('Copied')),
      () => setSaid(trans.__('Not copied: select it and press Ctrl+C'))
    );
  return (
    <button type="button" class="llmc-button llmc-copy" aria-label={name} onClick={() => void copy()}>
      <span aria-live="polite">{said || (label ?? trans.__('Copy'))}</span>
    </button>
  );
}

/** A question before something is lost. Esc and the first button leave everything as it is. */
export function Confirm(props: {
  question: ComponentChildren;
  doIt: string;
  isBusy: boolean;
  onYes: () => void;
  onNo: () => void;
}) {
  const trans = useTrans();
  const area = useRef<HTMLDivElement>(null);
  const keep = useRef<HTMLButtonElement>(null);
  useQuestion(area, keep, props.onNo);
  return (
    <div class="llmc-confirm" role="alertdialog" aria-label={trans.__('Are you sure?')} ref={area}>
      <div class="llmc-confirm-text">{props.question}</div>
      <div class="llmc-row">
        <button type="button" class="llmc-button" ref={keep} onClick={props.onNo}>
          {trans.__('Keep it')}
        </button>
        <button type="button" class="llmc-button llmc-danger" disabled={props.isBusy} onClick={props.onYes}>
          {props.isBusy ? trans.__('Ending …') : props.doIt}
        </button>
      </div>
    </div>
  );
}

/** The time of the server in seconds, again every `everyMs`. */
export function useNow(everyMs = 5000): number {
  const [now, setNow] = useState(serverNow);
  useEffect(() => {
    const timer = window.setInterval(() => setNow(serverNow()), everyMs);
    return () => window.clearInterval(timer);
  }, [everyMs]);
  return now;
}
