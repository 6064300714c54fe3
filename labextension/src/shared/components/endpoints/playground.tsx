// Ask an endpoint and watch its answer come.
import { useEffect, useRef, useState } from 'preact/hooks';

import { stream, type Message, type Sampling } from '../../api/completions';
import { formatLatency } from '../../format';
import type { Client } from '../../stores/client';
import { useTrans } from '../../translation';
import { Problem } from '../parts';

const DRAWN_EVERY_MS = 50;

/** `isReady`: whether a replica can answer now. */
export function Playground({ client, name, isReady }: { client: Client; name: string; isReady: boolean }) {
  const trans = useTrans();
  const [mode, setMode] = useState<'chat' | 'text'>('chat');
  const [text, setText] = useState('');
  const [messages, setMessages] = useState<Message[]>([]);
  const [maxTokens, setMaxTokens] = useState('128');
  const [temperature, setTemperature] = useState('0.8');
  const [topP, setTopP] = useState('1');
  const [seed, setSeed] = useState('');
  const [problem, setProblem] = useState('');
  const [speed, setSpeed] = useState('');
  const [abort, setAbort] = useState<AbortController | null>(null);
  const latest = useRef<AbortController | null>(null);
  const talk = useRef<'chat' | 'text'>('chat'); // what the messages are of
  useEffect(() => () => latest.current?.abort(), []);

  const ask = async () => {
    // A text that was continued is no part of a conversation.
    const before = mode === 'chat' && talk.current === 'chat' ? messages : [];
    const asked: Message[] = [...before, { role: 'user', content: text }];
    talk.current = mode;
    const controller = new AbortController();
    latest.current = controller;
    setAbort(controller);
    setProblem('');
    setSpeed('');
    setText('');
    setMessages([...asked, { role: 'assistant', content: '' }]);
    const began = performance.now();
    let answer = '';
    let numPieces = 0;
    let firstMs = 0;
    let drawnAt = 0;
    let isDone = false;
    const draw = () => {
      drawnAt = performance.now();
      setMessages([...asked, { role: 'assistant', content: answer }]);
    };
    const sampling = samplingOf({ max_tokens: maxTokens, temperature, top_p: topP, seed });
    try {
      for await (const piece of stream(client.connection, name, mode === 'chat' ? asked : text, sampling, controller.signal)) {
        answer += piece;
        numPieces += piece ? 1 : 0;
        firstMs = firstMs || (piece ? performance.now() - began : 0);
        if (performance.now() - drawnAt > DRAWN_EVERY_MS) {
          draw();
        }
      }
      isDone = true;
    } catch (error) {
      if (!controller.signal.aborted) {
        setProblem(error instanceof Error ? error.message : String(error));
      }
    } finally {
      if (answer || isDone) {
        draw();
      } else {
        // Nothing was answered: the next question must not follow on an empty answer.
        setMessages(before);
        setText(typed => typed || text);
      }
      setAbort(null);
      if (numPieces) {
        const seconds = (performance.now() - began) / 1000;
        const rate = (numPieces / Math.max(seconds, 1e-3)).toFixed(1);
        setSpeed(trans.__('first token after %1, %2 pieces/s', formatLatency(firstMs / 1000), rate));
      }
    }
  };
  const canAsk = isReady && !abort && text.trim() !== '';
  return (
    <div class="llmc-part llmc-playground">
      <header class="llmc-panel-head">
        <h3>{trans.__('Playground')}</h3>
        <div class="llmc-row" role="group" aria-label={trans.__('How the text is taken')}>
          <button type="button" class="llmc-button" aria-pressed={mode === 'chat'} onClick={() => setMode('chat')}>{trans.__('Chat')}</button>
          <button type="button" class="llmc-button" aria-pressed={mode === 'text'} onClick={() => setMode('text')}>{trans.__('Continue a text')}</button>
        </div>
      </header>
      {messages.length > 0 && (
        <div class="llmc-talk" role="log" aria-label={trans.__('Conversation')} aria-busy={abort !== null} tabIndex={0}>
          {messages.map((message, at) => (
            <div key={at} class="llmc-message" data-role={message.role}>
              <span class="llmc-message-who">{message.role === 'user' ? trans.__('You') : name}</span>
              <span class="llmc-message-text">{message.content}</span>
            </div>
          ))}
        </div>
      )}
      <Problem text={problem} />
      <form
        onSubmit={event => {
          event.preventDefault();
          if (canAsk) {
            void ask();
          }
        }}
      >
        <textarea
          class="llmc-ask"
          rows={2}
          value={text}
          aria-label={trans.__('What to ask %1', name)}
          placeholder={isReady ? trans.__('Ask it; Enter sends, Shift+Enter begins a new line') : trans.__('No replica is ready yet')}
          onInput={event => setText(event.currentTarget.value)}
          onKeyDown={event => {
            if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
              event.preventDefault();
              event.currentTarget.form?.requestSubmit();
            }
          }}
        />
        <div class="llmc-row">
          {abort ? (
            <button type="button" class="llmc-button" onClick={() => abort.abort()}>{trans.__('Stop')}</button>
          ) : (
            <button class="llmc-button llmc-primary" disabled={!canAsk}>{trans.__('Send')}</button>
          )}
          <button type="button" class="llmc-button" disabled={!messages.length || abort !== null}
            onClick={() => { setMessages([]); setSpeed(''); setProblem(''); }}>
            {trans.__('Clear')}
          </button>
          <span class="llmc-soft" role="status">{speed}</span>
        </div>
        <details class="llmc-details">
          <summary>{trans.__('Parameters')}</summary>
          <div class="llmc-row">
            <Parameter label="max_tokens" value={maxTokens} onValue={setMaxTokens} min="1" step="1" />
            <Parameter label="temperature" value={temperature} onValue={setTemperature} min="0" max="2" step="0.1" />
            <Parameter label="top_p" value={topP} onValue={setTopP} min="0" max="1" step="0.05" />
            <Parameter label="seed" value={seed} onValue={setSeed} step="1" />
          </div>
        </details>
      </form>
    </div>
  );
}

/** What is asked for by the texts of the form: an empty field leaves it to the model. */
export function samplingOf(texts: Record<keyof Sampling, string>): Sampling {
  const filled = Object.entries(texts).filter(([, text]) => text.trim() !== '');
  return Object.fromEntries(filled.map(([name, text]) => [name, Number(text)]));
}

function Parameter(props: { label: string; value: string; onValue: (value: string) => void; min?: string; max?: string; step: string }) {
  const { label, onValue, ...limits } = props;
  return (
    <label class="llmc-parameter">
      <span>{label}</span>
      <input type="number" {...limits} onInput={event => onValue(event.currentTarget.value)} />
    </label>
  );
}
