// A server of events for unit tests: sockets that record what they are sent and say what a test lets them say.
import { vi } from 'vitest';

import type { EventSocket, Surroundings } from '../src/shared/api/events';
import type { ClientMessage, ServerMessage } from '../src/shared/api/types';

export class FakeSocket {
  onmessage: ((event: { data: unknown }) => void) | null = null;
  onclose: (() => void) | null = null;
  readonly sent: ClientMessage[] = [];
  isClosed = false;

  constructor(readonly url: string) {}

  send(text: string): void {
    this.sent.push(JSON.parse(text) as ClientMessage);
  }

  close(): void {
    this.isClosed = true;
    this.onclose?.();
  }

  say(...messages: ServerMessage[]): void {
    messages.forEach(message => this.onmessage?.({ data: JSON.stringify(message) }));
  }

  hello(epoch = 'one'): void {
    this.say({ type: 'hello', epoch, version: '0.1.0', heartbeat_s: 20, now: Date.now() / 1000 });
  }
}

/** Surroundings without a browser; frames come when a test says so. */
export function fakeSurroundings() {
  const sockets: FakeSocket[] = [];
  const polls: FakeSocket[] = [];
  const frames: (() => void)[] = [];
  const around: Surroundings = {
    openSocket: url => {
      const socket = new FakeSocket(url);
      sockets.push(socket);
      return socket as EventSocket;
    },
    openPolling: () => {
      const socket = new FakeSocket('polling');
      polls.push(socket);
      return socket as EventSocket;
    },
    page: document,
    nextFrame: callback => void frames.push(callback)
  };
  const drawFrame = () => frames.splice(0).forEach(callback => callback());
  return { sockets, polls, around, drawFrame };
}

export function setVisible(isVisible: boolean): void {
  vi.spyOn(document, 'visibilityState', 'get').mockReturnValue(isVisible ? 'visible' : 'hidden');
  document.dispatchEvent(new Event('visibilitychange'));
}
