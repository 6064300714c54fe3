// What an anywidget gives its front end, and how a component is mounted into it.
import { render, type ComponentChild } from 'preact';

import { pageConnection } from '../shared/api/connection';
import { keepFocus } from '../shared/focus';
import { type Client, clientOf } from '../shared/stores/client';

/** The model of an anywidget: traits of the kernel. */
export interface Model {
  get(trait: string): unknown;
  set(trait: string, value: unknown): void;
  save_changes(): void;
  send(message: unknown): void;
  on(event: string, listener: (message: unknown) => void): void;
  off(event: string, listener: (message: unknown) => void): void;
}

/** The client for the server of this page; null where there is none. */
export function pageClient(): Client | null {
  const connection = pageConnection();
  return connection && clientOf(connection);
}

/** An anywidget that shows what `make` makes of its model. */
export function widget(make: (model: Model) => ComponentChild) {
  return {
    render({ model, el }: { model: Model; el: HTMLElement }): () => void {
      el.classList.add('llmc-in-cell');
      render(make(model), el);
      const loseFocus = keepFocus(el);
      return () => {
        loseFocus();
        render(null, el);
      };
    }
  };
}
